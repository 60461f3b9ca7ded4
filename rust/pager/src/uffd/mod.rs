//! The memory of VMMs that speak Firecracker's userfaultfd handshake.
//!
//! A VMM connects to a socket and says its regions, with the descriptor of its memory
//! ([`handshake`], [`regions`]). From then on its page faults are answered from a device
//! ([`session`], [`serve`], [`fill`]), by a few threads for all VMMs of the process ([`crew`]).
//! What a successor needs is in descriptors that a keeper holds too ([`ledger`], [`Kept`]).
//!
//! Invariants:
//! - A page is the device's, or zeros once the VMM gave it back: decided and copied while no
//!   message is read ([`fill`]).
//! - What can't be read is waited for within a bound. Then the VMM is killed, or the page poisoned.
//! - A VMM is dead before its descriptor is closed ([`vmm`]), also where nobody is left to see to
//!   that ([`leash`]).

pub mod ahead;
pub mod crew;
pub mod door;
pub mod fill;
pub mod handshake;
pub mod host;
pub mod ioctl;
pub mod leash;
pub mod ledger;
pub mod memory;
pub mod regions;
pub mod serve;
pub mod server;
pub mod session;
pub mod vmm;

pub use crew::Limits;
pub use handshake::Refusal;
pub use host::{Ending, Guest, Host, Keep, Kept, OnBad, Options, Pages, Served, Why, Witness};
pub use regions::{Region, Regions};
pub use serve::Scratch;
pub use server::Server;
pub use session::State;
