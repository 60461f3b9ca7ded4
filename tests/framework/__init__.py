"""What tests stand on: homes, processes, virtual machines by hand."""
