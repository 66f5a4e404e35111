//! Pre-booted kernels: the state of a machine whose guest has reached init, kept in a file that later
//! machines continue from.
//!
//! A kernel's boot is the same every time as long as image, vCPUs, memory and processor are the same, so
//! it need not happen every time. A monitor ([`crate::control::Monitor::start_preboot`]) boots a machine and stops it in front of the first mark of init
//! ([`BootMark::InitEntered`]): nothing before that mark depends on the payload, and init executes it anew
//! in each machine. Later machines map or read the pages of guest memory and set the registers. What
//! must not be the same in two guests, random numbers and the time, init asks for afterwards and sets
//! before the payload runs.

pub(crate) mod capture;
pub(crate) mod error;
pub(crate) mod file;
pub(crate) mod kernel;
pub(crate) mod place;
pub(crate) mod state;
pub(crate) mod verified;

pub use error::PrebootError;
pub use state::key;
