//! `cargo xtask jail`: writes the system calls of the monitor's threads to docs/jail.md.

use crate::host::workspace;
use anyhow::{Context, Result, ensure};
use clap::Args;
use kindling_vmm::jail::{Rule, TABLE, Thread};
use std::fmt::Write;
use std::fs;

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Write nothing, and fail if docs/jail.md is not current
    #[arg(long)]
    check: bool,
}

/// The heading of the generated section, and that of the one after it, which a test compares.
const START: &str = "## System calls\n";
const END: &str = "## Attempts\n";

/// Writes or checks the page.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let path = workspace().join("docs/jail.md");
    let old = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let (before, rest) = old.split_once(START).context("docs/jail.md has no section of system calls")?;
    let (_, after) = rest.split_once(END).context("docs/jail.md has no section of attempts")?;
    let new = [before, START, &section(), END, after].concat();
    if arguments.check {
        ensure!(old == new, "docs/jail.md is not current; run `cargo xtask jail` and review the change");
    } else {
        fs::write(&path, new).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(0)
}

fn section() -> String {
    let mut text = String::from("\n");
    for thread in Thread::ALL {
        let _ = writeln!(text, "- {}: {} calls", thread.name(), thread.calls().count());
    }
    text += "\n| call | threads | arguments | for |\n|---|---|---|---|\n";
    for call in TABLE {
        let threads: Vec<_> = call.threads.iter().map(|thread| thread.name()).collect();
        let arguments = match call.rule {
            Rule::OneOf(argument, values) => {
                let values: Vec<_> = values.iter().map(|value| format!("{value:#x}")).collect();
                format!("argument {argument} is {}", values.join(", "))
            }
            Rule::Absent => "fails, as if the kernel did not have it".to_owned(),
            Rule::OwnProcess(argument) => format!("argument {argument} is the monitor's process"),
            _ => String::new(),
        };
        let _ = writeln!(text, "| {} | {} | {arguments} | {} |", call.name, threads.join(", "), call.reason);
    }
    text + "\n"
}
