"""Every limit on what comes from outside, and every bound on a wait, in one place.

Limits are checked before anything is allocated; a wait that reaches its bound is an error with the
name of what was waited for.
"""

from diapause.units import GIB, KIB, MIB

# What a person may ask for.
NAME_LENGTH_MAX = 63
MEMORY_BYTES_MIN = 128 * MIB
MEMORY_BYTES_MAX = 1024 * GIB
DISK_BYTES_MIN = 16 * MIB
DISK_BYTES_MAX = 16 * 1024 * GIB
CPUS_MAX = 64
FORKS_MAX = 64
PORT_FORWARDS_MAX = 32
REFERENCE_LENGTH_MAX = 128
BENCH_ROUNDS_MAX = 20
DIFF_EXTENTS_MAX = 1000  # listed; the counts are of all

# The API.
REQUEST_BODY_BYTES_MAX = 1 * MIB
EXEC_MESSAGE_BYTES_MAX = 64 * KIB
EXEC_ARGUMENTS_MAX = 4096
EXEC_ARGUMENTS_BYTES_MAX = 128 * KIB
VERBS_AT_ONCE_MAX = 64
VERBS_OF_ONE_SANDBOX_MAX = 8  # of those at once; the others of that sandbox wait outside
LOCK_WAITERS_MAX = 32
OPERATIONS_SEEN_MAX = 1000  # that have ended and are still remembered by the daemon

# What the catalog keeps of the past.
EVENTS_MAX = 10_000
EVENT_DETAIL_BYTES_MAX = 4 * KIB
OPERATIONS_KEPT_MAX = 10_000
IDEMPOTENCY_KEYS_MAX = 10_000
IDEMPOTENCY_KEY_LENGTH_MAX = 128
IDEMPOTENCY_S = 24 * 3600.0  # how long an answered request is kept

# Images.
KERNEL_BYTES_MAX = 256 * MIB
INITRD_BYTES_MAX = 1 * GIB
ROOT_DISK_BYTES_MAX = 64 * GIB
ROOT_DISK_ENTRIES_MAX = 2_000_000

# Files of ours, read back.
MANIFEST_BYTES_MAX = 1 * MIB
DEVICE_STATE_BYTES_MAX = 64 * MIB
QMP_LINE_BYTES_MAX = 16 * MIB

# The daemon's log: two files of this size at most.
LOG_BYTES_MAX = 16 * MIB
LOG_TEXT_LENGTH_MAX = 8192  # of a message or a traceback, in characters

# Captures.
CAPTURE_BUFFER_BYTES_MAX = 256 * MIB  # of tmpfs, for one capture; more spills or is read in place
CAPTURE_BUFFER_BYTES_MIN = 8 * MIB

# What a guest may write on its console before the log begins anew; one older one is kept.
CONSOLE_LOG_BYTES_MAX = 16 * MIB

# What a VMM may use, however its guest behaves.
VMM_DESCRIPTORS_MAX = 1024
VMM_THREADS_MAX = 512
VMM_MEMORY_OVERHEAD_BYTES = 1536 * MIB  # of its cgroup beyond the guest's; 1 GiB is translated code
VMM_FILE_OVERHEAD_BYTES = 256 * MIB  # a file of its own beyond the disk's size and an eighth
LAUNCH_REPORT_BYTES_MAX = 64 * KIB

# Waits, in seconds.
CONSOLE_LOOK_S = 0.5
DAEMON_START_S = 20.0
CLOSE_S = 5.0  # what a daemon that ends gives to work that nobody waits for
QMP_CALL_S = 20.0
QMP_CONNECT_S = 20.0
STATE_LOAD_S = 60.0
VMM_EXIT_S = 20.0
LAUNCH_S = 20.0
PAGER_S = 20.0  # an answer of the pager, which may be started again meanwhile
RECORD_S = 10.0  # how long after its resume what a guest touches is recorded
PREFETCH_BYTES_MAX = 256 * MIB  # what one resume may have brought ahead
PAGER_STALL_S = 10.0  # what an access waits for a blob before its VMM is killed
PAGER_SILENT_S = 30.0  # a pager that says nothing to its keeper for so long is replaced
LEAF_REMOVAL_S = 1.0  # of a cgroup whose processes are on their way out
AGENT_BOOT_S = 120.0
AGENT_READY_S = 30.0
GUEST_FREEZE_S = 5.0
LOCK_S = 300.0
RESCUE_S = 900.0
STALL_RETRY_S = 2.0
PACK_S = 1800.0
END_S = 2 * PACK_S  # longer than any verb: what ended meanwhile is settled behind it
BENCH_WORK_S = 300.0  # what a guest, or a process of ours, does between two figures of `bench`
SUBPROCESS_S = 300.0
IMAGE_BUILD_S = 1800.0

# What counts as right after a resume.
CLOCK_ERROR_MS_MAX = 100
