//! Runs a command in a new guest and prints what it wrote.

use kindling::{Guest, Image};
use std::io::Write;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The name of an image in a registry, or a path such as ./python.tar.
    let image = std::env::args().nth(1).unwrap_or_else(|| "debian:12".to_owned());
    let guest = Guest::builder(Image::open(image)?).memory_mib(256).start()?;

    let output = guest.command("sh").args(["-c", "echo $((6 * 7))"]).output()?;
    std::io::stdout().write_all(&output.stdout)?;
    if !output.status.success() {
        return Err(format!("the command ended with {}", output.status).into());
    }
    Ok(())
}
