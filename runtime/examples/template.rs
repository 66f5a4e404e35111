//! Saves a guest after a set-up, and starts copies of it, which have the set-up's files and random numbers of their own:
//! `cargo run --package kindling --example template -- busybox.tar NAME COPIES`
#![expect(clippy::print_stdout, reason = "it prints what the copies print")]

use kindling::{Guest, Image, Template, template};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let [image, name, copies] = &words[..] else {
        return Err("name an image and a template, and a number".into());
    };
    let builder = Guest::builder(Image::open(image)?).memory_mib(64);
    let saved = Template::create(name, builder, |guest| {
        let set_up = "echo prepared >/state; head -c 32 /dev/urandom >/dev/null";
        let status = guest.command("sh").args(["-c", set_up]).status()?;
        if status.success() { Ok(()) } else { Err(status.to_string().into()) }
    })?;
    for _ in 0..copies.parse()? {
        // Each copy leaves a parked one for the next.
        let copy = saved.guest().uses_spares().start()?;
        let script = "cat /state; head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid";
        let output = copy.command("sh").args(["-c", script]).output()?;
        print!("{}", String::from_utf8_lossy(&output.stdout));
    }
    template::remove(name)?;
    Ok(())
}
