//! `cargo xtask`: one file per command, and beside them what several commands share.
#![expect(clippy::print_stderr, clippy::print_stdout, reason = "commands speak to their user")]

mod archive;
mod bench;
mod bench_convert;
mod boot_code;
mod budget;
mod build_image;
mod cache;
mod cargo;
mod clean;
mod container;
mod debian;
mod docker_archive;
mod host;
mod kernel;
mod kernel_config;
mod lab;
mod output;
mod prices;
mod profile;
mod progress;
mod root_prices;
mod root_tree;
mod run;
mod test;
mod test_images;
mod test_lab;
mod test_network;
mod test_oci;
mod test_report;
mod test_root;
mod test_volumes;
mod transcripts;
mod vmlinux;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Builds, boots and tests Kindling.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Builds everything, boots the default image and prints its boot report
    Run(run::Arguments),
    /// Runs all tests: those of the crates, then those that boot guests
    Test(test::Arguments),
    /// Measures the figures of tests/boot-budget.json in many labs, and how much they differ
    Budget(budget::Arguments),
    /// Compares Kindling with other monitors: times, memory, exits
    Bench(Box<bench::Arguments>),
    /// Compares converting a container image with mkfs.erofs, on this machine
    BenchConvert {
        /// How often each is measured
        #[arg(long, default_value_t = 5)]
        runs: usize,
    },
    /// Shows where the time of one boot goes
    Profile(Box<profile::Arguments>),
    /// Makes a bootable image: kernel, root filesystem and their description
    BuildImage(build_image::Arguments),
    /// Checks, compares and explains the guest kernel's configuration
    KernelConfig(kernel_config::Arguments),
    /// Measures what a root filesystem costs in each form, by its size
    RootPrices(root_prices::Arguments),
    /// Runs a command on an emulated machine that has KVM
    Lab(lab::Arguments),
    /// Lists the VMM's functions that a boot executes, for the linker: vmm/boot-code.ld
    BootCode(boot_code::Arguments),
    /// Writes the output of the commands that README and docs show into them
    Transcripts(transcripts::Arguments),
    /// Removes the cache and says what that frees
    Clean(clean::Arguments),
    /// The part of `bench` that runs beside the monitors
    #[command(hide = true)]
    Measure(bench::measure::Arguments),
    /// The part of `boot-code` that runs beside the VMM
    #[command(hide = true)]
    FollowBoots(boot_code::follow::Arguments),
    /// The part of `profile` that runs beside the VMM
    #[command(hide = true)]
    ProfileBoots(profile::boots::Arguments),
}

fn main() -> ExitCode {
    if lab::guest::is_inside() {
        lab::guest::main();
    }
    let result = match Arguments::parse().command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Test(arguments) => test::run(&arguments),
        Command::Budget(arguments) => budget::run(&arguments),
        Command::BenchConvert { runs } => bench_convert::run(runs),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::BuildImage(arguments) => build_image::run(&arguments),
        Command::KernelConfig(arguments) => kernel_config::run(&arguments),
        Command::RootPrices(arguments) => root_prices::run(&arguments),
        Command::Transcripts(arguments) => transcripts::run(&arguments),
        Command::Lab(arguments) => lab::run(&arguments),
        Command::Clean(arguments) => clean::run(&arguments),
        Command::Profile(arguments) => profile::run(&arguments),
        Command::ProfileBoots(arguments) => profile::boots::run(&arguments),
        Command::BootCode(arguments) => boot_code::run(&arguments),
        Command::FollowBoots(arguments) => boot_code::follow::run(&arguments),
        Command::Measure(arguments) => bench::measure::run(&arguments),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}
