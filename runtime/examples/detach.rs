//! Pauses, resumes and detaches a guest, which then runs on without this program:
//! `cargo run --package kindling --example detach -- busybox.tar NAME`
#![expect(clippy::print_stdout, reason = "it prints what happens")]

use kindling::{Guest, Image};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let mut words = std::env::args().skip(1);
    let image = Image::open(words.next().ok_or("name an image")?)?;
    let name = words.next().ok_or("name the guest")?;
    let guest = Guest::builder(image).name(&name).memory_mib(128).start()?;
    guest.pause()?;
    println!("paused: {}", guest.statistics()?.is_paused);
    // A command that is started while the guest is paused runs when the guest is resumed.
    let status = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| guest.command("true").status().map_err(|error| error.to_string()));
        guest.resume().map_err(|error| error.to_string())?;
        waiting.join().map_err(|_| "a thread panicked".to_owned())?
    })?;
    println!("paused: {}, then {status}", guest.statistics()?.is_paused);
    guest.detach()?;
    // The guest is found by its name, here and in other programs.
    Guest::open_running(&name)?.command("touch").arg("/tmp/left").status()?;
    Ok(())
}
