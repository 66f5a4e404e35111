//! `cargo xtask kernel-config`: the guest kernel's configuration, checked, compared, explained.

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
    /// Whose fragments
    #[arg(long, value_enum, global = true, default_value = "boot")]
    profile: Profile,
    /// Configuration to add to them: a file, or the name of an optional fragment
    #[arg(long, value_name = "FILE|NAME", global = true)]
    config_fragment: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Composes the fragments and says what of them the kernel does not take, and why
    Check,
    /// Lists the symbols in which two .config files differ
    Diff {
        /// One configuration
        a: PathBuf,
        /// The other
        b: PathBuf,
    },
    /// Says what a symbol is, what it needs, its value, and which fragment asks for it
    Explain {
        /// The symbol, with or without CONFIG_
        symbol: String,
    },
    /// Builds the kernel with and without each fragment and lists what each costs
    Prices {
        /// Also write the list to this file
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// Price of this fragment alone, instead of all; may be repeated
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
            println!("all {} symbols of {} fragments are as asked", asked.len(), fragments.len());
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
            known.extend(fragments.into_iter().filter(|fragment| arguments.is_users(fragment)));
            print!("{}", explain(symbol, &kconfig, Some(&config), &known));
        }
    }
    Ok(0)
}

impl Arguments {
    fn is_users(&self, fragment: &guest_kernel_config::Fragment) -> bool {
        self.config_fragment.iter().any(|path| path.to_string_lossy().ends_with(&fragment.name))
    }
}
