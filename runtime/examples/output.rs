//! Runs a command in a new guest and prints its output:
//! `cargo run --package kindling --example output -- python.tar python3 -c 'print(1)'`
#![expect(clippy::print_stdout, reason = "it prints what the command wrote")]

use kindling::{Guest, Image};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let mut words = std::env::args_os().skip(1);
    let image = Image::open(words.next().ok_or("name an image")?)?;
    let guest = Guest::builder(image).memory_mib(256).start()?;
    let output = guest.command(words.next().ok_or("name a command")?).args(words).output()?;
    print!("{}", String::from_utf8_lossy(&output.stdout));
    if !output.status.success() {
        return Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(())
}
