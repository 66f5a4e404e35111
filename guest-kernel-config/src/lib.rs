//! The configuration of the guest's kernel, as fragments in which every line says why it is there.
//!
//! The kernel of a microVM starts from nothing (`make tinyconfig`) and gains only what a line of a
//! [`Fragment`] asks for. [`shipped_named`] gives the fragments of this crate, [`compose`] merges
//! them with those of a user into the text to append to the `.config`, and [`check`] compares what
//! `make olddefconfig` made of it with what was asked for. Where the two differ, [`Unmet`] says
//! which fragment and line lost and why, which it finds by reading the kernel's own Kconfig files
//! ([`Kconfig`]). [`explain()`] says all of that about one symbol.
//!
//! Nothing here runs `make` or writes a file.
//!
//! ```
//! use guest_kernel_config::{
//!     Fragment, Kconfig, KernelConfig, Origin, check, compose, shipped_named,
//! };
//!
//! // Ask for the shipped console and for one thing more.
//! let mut fragments = shipped_named(&["console"])?;
//! fragments.push(Fragment::parse("my.config", b"CONFIG_X86_PAT=y\n", Origin::User)?);
//! let asked = compose(&fragments)?;
//! assert!(asked.text().ends_with("CONFIG_X86_PAT=y\n"));
//!
//! // A kernel tree would come from `KernelTree`; this one has a single symbol.
//! let tree = |_: &str| Ok(b"config X86_PAT\n\tbool \"PAT\"\n\tdepends on MTRR\n".to_vec());
//! let kconfig = Kconfig::read(&tree)?;
//!
//! // After `make olddefconfig` the symbol is gone, and the check says why.
//! let unmet = check(&asked, &KernelConfig::default(), &kconfig).unwrap_err();
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

pub use check::{Culprit, Reason, Unmet, check};
pub use compose::{Asked, ComposeError, Composed, compose};
pub use config::{ConfigError, Difference, KernelConfig, MAX_CONFIG_BYTES, diff};
pub use explain::explain;
pub use fragment::{Fragment, FragmentError, MAX_FRAGMENT_BYTES, Origin, Setting};
pub use kconfig::{Kconfig, KconfigError, KernelTree};
pub use needs::{Means, Need};
pub use shipped::{DEFAULT, OPTIONAL, RUN, shipped, shipped_named};
pub use value::Value;
