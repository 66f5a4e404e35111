//! Copies a file into a guest, sorts its lines there, and copies the result out:
//! `cargo run --package kindling --example files -- busybox.tar words sorted`

use kindling::{Guest, Image};
use std::error::Error;
use std::io::Write;
use std::time::Duration;

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    let [image, from, to] = &words[..] else { return Err("name an image and two files".into()) };
    let guest = Guest::builder(Image::open(image)?).memory_mib(128).start()?;
    guest.copy_in(from, "/tmp/words")?;
    let status = guest.command("sort").args(["-o", "/tmp/sorted", "/tmp/words"]).status()?;
    if !status.success() {
        return Err(format!("sort ended with {status}").into());
    }
    guest.copy_out("/tmp/sorted", to)?;
    writeln!(std::io::stdout(), "ended by itself: {}", guest.stop(Duration::from_secs(5))?)?;
    Ok(())
}
