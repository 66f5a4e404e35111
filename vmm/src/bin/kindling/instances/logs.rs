//! `kindling logs`: what a detached guest wrote.

use super::log::{Reader, Stream};
use super::vmm::Vmm;
use super::{Found, InstanceError, host};
use crate::complain;
use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::OwnedFd;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use std::io::{self, Write};

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Go on until the guest ends
    #[arg(long, short = 'f')]
    follow: bool,
    /// Name of the guest
    name: String,
}

/// Prints it, each stream on its own; the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    print(arguments).map_or_else(
        |error| {
            complain(&error);
            error.status()
        },
        |()| 0,
    )
}

fn print(arguments: &Arguments) -> Result<(), InstanceError> {
    let guest = Found::named(&arguments.name)?;
    let failed = |what| host(what, &guest.folder);
    let vmm = if arguments.follow { guest.vmm()? } else { None };
    // Before the first look, so that nothing comes between the last look and the watch.
    let changes = watch(&guest).map_err(|error| failed("watch")(error.into()))?;
    let reader = Reader::open(&guest.folder).map_err(failed("read the log in"))?;
    let mut reader = reader.ok_or_else(|| InstanceError::NoLog(guest.name.clone()))?;
    let mut has_ended = vmm.is_none();
    loop {
        while let Some((stream, bytes)) = reader.next().map_err(failed("read the log in"))? {
            match deliver(stream, &bytes) {
                // Nobody reads it any more.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                result => result.map_err(failed("deliver the log in"))?,
            }
        }
        let (false, Some(vmm)) = (has_ended, &vmm) else { return Ok(()) };
        has_ended = wait(vmm, &changes).map_err(|error| failed("watch")(error.into()))?;
    }
}

fn watch(guest: &Found) -> Result<OwnedFd, Errno> {
    let changes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    inotify::add_watch(&changes, &guest.folder, WatchFlags::MODIFY | WatchFlags::CREATE)?;
    Ok(changes)
}

/// Waits for a change; whether the guest has ended, after which nothing changes.
fn wait(vmm: &Vmm, changes: &OwnedFd) -> Result<bool, Errno> {
    let mut fds = [PollFd::new(vmm, PollFlags::IN), PollFd::new(changes, PollFlags::IN)];
    match poll(&mut fds, None) {
        Err(Errno::INTR) => return Ok(false),
        result => result?,
    };
    let has_ended = !fds[0].revents().is_empty();
    // That something changed is all they say.
    while rustix::io::read(changes, &mut [0; 4096][..]).is_ok() {}
    Ok(has_ended)
}

fn deliver(stream: Stream, bytes: &[u8]) -> io::Result<()> {
    match stream {
        Stream::Output => {
            let mut stdout = io::stdout().lock();
            stdout.write_all(bytes)?;
            stdout.flush()
        }
        Stream::Error => io::stderr().write_all(bytes),
    }
}
