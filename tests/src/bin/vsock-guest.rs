//! The guest program of the vsock tests, because busybox has no vsock support.
//!
//! `connect PORT` copies standard input to a port of the host, and its reply to standard output. `echo PORT COUNT`
//! echoes COUNT concurrent connections. `many PORT COUNT` opens COUNT concurrent connections to a port of the host, and
//! `sequence PORT COUNT` opens them one after the other. `send PORT BYTES` and `receive PORT BYTES` are one end of a
//! stream of [`tests::vsock::Pattern`].
#![expect(clippy::print_stdout, reason = "the results go to standard output")]

use std::io::{self, Read, Write};
use std::process::ExitCode;
use tests::vsock::{Listener, Pattern, Stream, check, shut_down};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| arguments.get(at).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    let port = u32::try_from(number(1)).unwrap_or(0);
    let done = match arguments.first().map(String::as_str) {
        Some("connect") => copy(port),
        Some("echo") => echo(port, number(2)),
        Some("many") => many(port, number(2)),
        Some("sequence") => sequence(port, number(2)),
        Some("send") => send(port, number(2)),
        Some("receive") => Stream::connect(port).and_then(|mut stream| check(&mut stream, number(2))),
        _ => Err(io::Error::other("unknown command")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{}: {error}", arguments.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn copy(port: u32) -> io::Result<()> {
    let mut stream = Stream::connect(port)?;
    io::copy(&mut io::stdin(), &mut stream)?;
    shut_down(&stream, libc::SHUT_WR)?;
    io::copy(&mut stream, &mut io::stdout())?;
    Ok(())
}

fn echo(port: u32, count: u64) -> io::Result<()> {
    let listener = Listener::bind(port)?;
    println!("listening");
    let mut threads = Vec::new();
    for _ in 0..count {
        let mut stream = listener.accept()?;
        let answer = move || -> io::Result<()> {
            let mut bytes = vec![0; 16 << 10];
            loop {
                match stream.read(&mut bytes)? {
                    0 => return shut_down(&stream, libc::SHUT_WR),
                    length => stream.write_all(&bytes[..length])?,
                }
            }
        };
        threads.push(std::thread::Builder::new().stack_size(64 << 10).spawn(answer)?);
    }
    for thread in threads {
        thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))?;
    }
    Ok(())
}

fn exchange(stream: &mut Stream, number: u64) -> io::Result<()> {
    stream.write_all(&number.to_le_bytes())?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer)?;
    if u64::from_le_bytes(answer) != number {
        return Err(io::Error::other("unexpected reply"));
    }
    Ok(())
}

fn many(port: u32, count: u64) -> io::Result<()> {
    let mut streams = (0..count).map(|_| Stream::connect(port)).collect::<io::Result<Vec<_>>>()?;
    for (number, stream) in (0..).zip(&mut streams) {
        exchange(stream, number)?;
    }
    Ok(())
}

fn sequence(port: u32, count: u64) -> io::Result<()> {
    for number in 0..count {
        exchange(&mut Stream::connect(port)?, number)?;
    }
    Ok(())
}

fn send(port: u32, bytes: u64) -> io::Result<()> {
    let mut stream = Stream::connect(port)?;
    Pattern::default().write_to(&mut stream, bytes)?;
    shut_down(&stream, libc::SHUT_WR)?;
    // The peer closes the stream when it has received everything.
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest)?;
    Ok(())
}
