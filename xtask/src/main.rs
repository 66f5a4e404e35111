//! `cargo xtask`: one module per command, and the modules that several commands share.
#![expect(clippy::print_stderr, clippy::print_stdout, reason = "commands speak to their user")]

mod api;
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
mod fuzz;
mod host;
mod jail;
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

/// Build, boot and test Kindling
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build everything, boot the default image and print its boot report
    Run(run::Arguments),
    /// Run all tests: the unit tests, then the tests that boot guests
    Test(test::Arguments),
    /// Measure the values of tests/boot-budget.json in many labs and print their spread
    Budget(budget::Arguments),
    /// Compare boot times, memory and exits of Kindling and other monitors
    Bench(Box<bench::Arguments>),
    /// Compare the conversion of a container image with mkfs.erofs, on this machine
    BenchConvert {
        /// Number of times each conversion is measured
        #[arg(long, default_value_t = 5)]
        runs: usize,
    },
    /// Show where the time of one boot goes
    Profile(Box<profile::Arguments>),
    /// Build a bootable image: kernel, root filesystem and image.json
    BuildImage(build_image::Arguments),
    /// Check, compare and explain guest kernel configurations
    KernelConfig(kernel_config::Arguments),
    /// Measure the cost of a root filesystem as an initramfs and as EROFS, by its size
    RootPrices(root_prices::Arguments),
    /// Run a command in the lab, an emulated machine with KVM
    Lab(lab::Arguments),
    /// Run the fuzz targets, or replay their corpora
    Fuzz(fuzz::Arguments),
    /// Update cli/boot-code.ld and vmm/boot-code.ld, the linker's lists of the functions that starts execute
    BootCode(boot_code::Arguments),
    /// Update the command output shown in README.md and docs
    Transcripts(transcripts::Arguments),
    /// Write the public items of the libraries to docs/api.md
    Api(api::Arguments),
    /// Write the system calls of the monitor's threads to docs/jail.md
    Jail(jail::Arguments),
    /// Remove the cache
    Clean(clean::Arguments),
    /// The part of `bench` that runs beside the monitors
    #[command(hide = true)]
    Measure(bench::measure::Arguments),
    /// The part of `boot-code` that runs in the lab
    #[command(hide = true)]
    FollowBoots(boot_code::follow::Arguments),
    /// The part of `profile` that runs beside the VMM
    #[command(hide = true)]
    ProfileBoots(profile::boots::Arguments),
    /// The part of `profile --scenario run` that runs beside the VMM
    #[command(hide = true)]
    ProfileRun(profile::run::measure::Arguments),
}

fn main() -> ExitCode {
    if lab::guest::is_inside() {
        lab::guest::main();
    }
    let result = match Arguments::parse().command {
        Command::Api(arguments) => api::run(&arguments),
        Command::Jail(arguments) => jail::run(&arguments),
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
        Command::ProfileRun(arguments) => profile::run::measure::run(&arguments),
        Command::Fuzz(arguments) => fuzz::run(&arguments),
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
