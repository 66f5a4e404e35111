//! Starts a guest with the programs and the kernel of an installation that the program chooses:
//! `cargo run --package kindling --example installed -- target/x86_64-unknown-linux-gnu/release target/images/run ./app.tar`

use kindling::{Guest, Image, installation};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let mut words = std::env::args_os().skip(1);
    let mut next = || words.next().ok_or("name the directories of programs and kernel, and an image");
    installation::set_programs(next()?)?;
    installation::set_kernel(next()?)?;
    let guest = Guest::builder(Image::open(next()?)?).start()?;
    let status = guest.command("echo").arg("it runs").status()?;
    if status.success() { Ok(()) } else { Err(status.to_string().into()) }
}
