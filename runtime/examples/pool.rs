//! A pool of guests, each of which keeps its state between commands:
//! `cargo run --package kindling --example pool -- busybox.tar 3`
#![expect(clippy::print_stdout, reason = "it prints what the guests wrote")]

use kindling::{Guest, Image};
use std::error::Error;
use std::io::Write;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let image = Image::open(words.next().ok_or("name an image")?)?;
    let count = words.next().ok_or("say how many guests")?.parse::<u32>()?;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (1..=count)
            .map(|number| (number, image.clone()))
            .map(|(number, image)| {
                scope.spawn(move || work(&Guest::builder(image).memory_mib(128).start()?, number))
            })
            .collect();
        for worker in workers {
            print!("{}", worker.join().map_err(|_| "a worker panicked")??);
        }
        Ok(())
    })
}

/// Runs commands in a guest, the first with piped input.
fn work(guest: &Guest, number: u32) -> Result<String> {
    let mut child = guest
        .command("sh")
        .args(["-c", "read word; echo $word > /tmp/word; echo $((word * word))"])
        .stdin(kindling::Stdio::Piped)
        .stdout(kindling::Stdio::Piped)
        .spawn()?;
    let mut input = child.stdin.take().ok_or("no input")?;
    writeln!(input, "{number}")?;
    drop(input);
    let square = String::from_utf8(child.wait_with_output()?.stdout)?;
    // Files of one process are visible to the next one in the same guest, and in no other.
    let word = guest.command("cat").arg("/tmp/word").output()?;
    Ok(format!("{} squared is {square}", String::from_utf8(word.stdout)?.trim()))
}
