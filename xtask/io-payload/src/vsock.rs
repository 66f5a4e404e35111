//! A stream to the host over vsock.

use anyhow::Result;
use io_payload::{Operation, VSOCK_PORT, run_stream};
use std::fs::File;
use std::os::fd::FromRawFd;

/// A connected vsock stream to the host.
pub(crate) struct Vsock(File);

impl Vsock {
    /// Connects, if the guest has a vsock device and the host listens.
    #[expect(unsafe_code, reason = "std has no vsock")]
    pub(crate) fn open() -> Option<Self> {
        // SAFETY: the calls read a structure of the given size, and only `file` owns the descriptor.
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

    /// Performs an operation `count` times.
    pub(crate) fn repeat(&mut self, operation: Operation, count: u32) -> Result<()> {
        Ok(run_stream(&mut self.0, operation, count)?)
    }
}
