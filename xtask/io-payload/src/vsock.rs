//! Streams to whoever started the guest, over vsock.

use anyhow::Result;
use io_payload::{Operation, VSOCK_PORT, ask};
use std::fs::File;
use std::os::fd::FromRawFd;

/// A stream to the host.
pub(crate) struct Vsock(File);

impl Vsock {
    /// Connects, if there is a device and somebody listens behind it.
    #[expect(unsafe_code, reason = "std has no vsock")]
    pub(crate) fn open() -> Option<Self> {
        // SAFETY: the calls read a structure of the size that they are told, and the descriptor is nobody else's.
        unsafe {
            let socket = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
            if socket < 0 {
                return None;
            }
            let file = File::from_raw_fd(socket);
            let mut address: libc::sockaddr_vm = std::mem::zeroed();
            address.svm_family = u16::try_from(libc::AF_VSOCK).ok()?;
            address.svm_port = VSOCK_PORT;
            address.svm_cid = libc::VMADDR_CID_HOST;
            let size = u32::try_from(size_of::<libc::sockaddr_vm>()).ok()?;
            (libc::connect(socket, (&raw const address).cast(), size) == 0).then_some(Self(file))
        }
    }

    /// Does an operation so many times.
    pub(crate) fn repeat(&mut self, operation: Operation, count: u32) -> Result<()> {
        Ok(ask(&mut self.0, operation, count)?)
    }
}
