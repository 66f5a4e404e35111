//! `cargo xtask kernel-config`: checks, compares and explains configurations of the guest kernel.

use crate::build_image::{self, Profile};
use crate::{kernel, prices};
use anyhow::Result;
use clap::{Args, Subcommand};
use guest_kernel_config::{Kconfig, KernelConfig, KernelTree, compose, diff, explain, shipped};
use std::path::PathBuf;

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Kernel source: a folder or a tarball, instead of Debian's package
    #[arg(long, value_name = "DIR|TARBALL", global = true)]
    kernel_source: Option<PathBuf>,
    /// Profile whose fragments are used
    #[arg(long, value_enum, global = true, default_value = "boot")]
    profile: Profile,
    /// Kernel configuration to add: a file, or the name of an optional fragment; may be repeated
    #[arg(long, value_name = "FILE|NAME", global = true)]
    config_fragment: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check that the kernel accepts all settings of the fragments
    Check,
    /// List the symbols that differ between two .config files
    Diff {
        /// First configuration
        a: PathBuf,
        /// Second configuration
        b: PathBuf,
    },
    /// Show a symbol's description, dependencies, value and the fragment that sets it
    Explain {
        /// Symbol, with or without CONFIG_
        symbol: String,
    },
    /// Build the kernel with and without each fragment and list the cost of each
    Prices {
        /// Write the list to this file as well
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// Measure only this fragment; may be repeated
        #[arg(long, value_name = "NAME")]
        only: Vec<String>,
    },
}

/// Runs the subcommand.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    match &arguments.command {
        Command::Check => {
            let fragments = build_image::fragments(arguments.profile, &arguments.config_fragment)?;
            let asked = compose(&fragments)?;
            kernel::configure(&kernel::source(arguments.kernel_source.as_deref())?, &asked)?;
            println!(
                "all {} symbols of {} fragments have the requested values",
                asked.len(),
                fragments.len()
            );
        }
        Command::Prices { out, only } => {
            return prices::run(arguments.kernel_source.as_deref(), only, out.as_deref());
        }
        Command::Diff { a, b } => {
            for difference in diff(&KernelConfig::read(a)?, &KernelConfig::read(b)?) {
                println!("{difference}");
            }
        }
        Command::Explain { symbol } => {
            let source = kernel::source(arguments.kernel_source.as_deref())?;
            let fragments = build_image::fragments(arguments.profile, &arguments.config_fragment)?;
            let config = kernel::configure(&source, &compose(&fragments)?)?;
            let kconfig = Kconfig::read(&KernelTree::new(&source.directory))?;
            let mut known = shipped()?;
            known.extend(fragments.into_iter().filter(|fragment| arguments.is_user_fragment(fragment)));
            print!("{}", explain(symbol, &kconfig, Some(&config), &known));
        }
    }
    Ok(0)
}

impl Arguments {
    fn is_user_fragment(&self, fragment: &guest_kernel_config::Fragment) -> bool {
        self.config_fragment.iter().any(|path| path.to_string_lossy().ends_with(&fragment.name))
    }
}
