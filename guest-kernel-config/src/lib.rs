//! The configuration of the guest kernel, as Kconfig fragments with a reason on each line.
//!
//! The kernel of a microVM starts from `make tinyconfig` and enables only what a [`Fragment`] requests.
//! [`shipped_named`] returns fragments of this crate, [`compose`] merges them with fragments of a user into the text to
//! append to the `.config`, and [`check`] compares the result of `make olddefconfig` with the requests. For each
//! difference, [`Unmet`] names the fragment and line that had no effect and the reason, which is derived from the
//! kernel's own Kconfig files ([`Kconfig`]). [`explain()`] describes one symbol.
//!
//! This crate neither runs `make` nor writes files.
//!
//! ```
//! use guest_kernel_config::{
//!     Fragment, Kconfig, KernelConfig, Origin, check, compose, shipped_named,
//! };
//!
//! // Request the shipped console and one further option.
//! let mut fragments = shipped_named(&["console"])?;
//! fragments.push(Fragment::parse("my.config", b"CONFIG_X86_PAT=y\n", Origin::User)?);
//! let requests = compose(&fragments)?;
//! assert!(requests.text().ends_with("CONFIG_X86_PAT=y\n"));
//!
//! // A real kernel tree is a `KernelTree`; this one has a single symbol.
//! let tree = |_: &str| Ok(b"config X86_PAT\n\tbool \"PAT\"\n\tdepends on MTRR\n".to_vec());
//! let kconfig = Kconfig::read(&tree)?;
//!
//! // `make olddefconfig` dropped the symbol, and the check reports the reason.
//! let unmet = check(&requests, &KernelConfig::default(), &kconfig).unwrap_err();
//! let pat = unmet.iter().find(|unmet| unmet.symbol == "X86_PAT").unwrap();
//! assert_eq!((pat.file.as_str(), pat.line), ("my.config", 1));
//! assert!(pat.to_string().contains("it needs CONFIG_MTRR (is not set"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod check;
mod compose;
mod config;
mod explain;
mod fragment;
pub mod kconfig;
mod nearest;
mod needs;
mod shipped;
mod value;

pub use check::{Cause, Reason, Unmet, check};
pub use compose::{ComposeError, Composed, Request, compose};
pub use config::{ConfigError, Difference, KernelConfig, MAX_CONFIG_BYTES, diff};
pub use explain::explain;
pub use fragment::{Fragment, FragmentError, MAX_FRAGMENT_BYTES, Origin, Setting};
pub use kconfig::{Kconfig, KconfigError, KernelTree};
pub use needs::{Need, Remedy};
pub use shipped::{DEFAULT, OPTIONAL, RUN, shipped, shipped_named};
pub use value::Value;
