//! `kindling image`: manages converted container images, by executing `kindling-oci`.

use crate::{STATUS_FAILURE, print_error};
use clap::Args;
use kindling::image::{self, ImageError};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// `ls`, `rm IMAGE...`, `prune [--unused DAYS]`, or `prepare IMAGE`, which pulls and converts an image in advance
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// Executes the program in place of this one. Returns the exit status if that fails.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    match image::converter() {
        Ok(program) => {
            let error = Command::new(program).args(&arguments.command).exec();
            print_error(&ImageError::NoConverter(error));
        }
        Err(error) => print_error(&error),
    }
    STATUS_FAILURE
}
