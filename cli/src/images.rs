//! `kindling image`: what container images have become, after which `kindling-oci` looks.

use crate::{STATUS_FAILURE, complain};
use clap::Args;
use kindling::image::{self, ImageError};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// `ls`, `rm IMAGE...`, `prune [--unused DAYS]`, or `prepare IMAGE`, which `kindling run` does by itself
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// Becomes that program; returns where there is none.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    match image::converter() {
        Ok(program) => {
            let error = Command::new(program).args(&arguments.command).exec();
            complain(&ImageError::NoConverter(error));
        }
        Err(error) => complain(&error),
    }
    STATUS_FAILURE
}
