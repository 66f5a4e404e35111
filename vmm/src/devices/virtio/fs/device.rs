//! From the configuration to the device, and the implementation of [`Device`].

use super::{HIPRIO, KIND, QUEUE_SIZES, REQUESTS, SERVER, Server, SharedFolder, TAG_MAX};
use crate::config::devices::SharedFolder as Config;
use crate::devices::virtio::backend::{Attach, Backend};
use crate::devices::virtio::{BackendError, Device, DeviceError, Event, Progress, Queues, Watcher};
use vm_memory::GuestAddress;

impl Attach for Config {
    fn open(&self) -> Result<Backend, BackendError> {
        Ok(Backend::Folder(Server::start(self)?))
    }

    fn create(&self, backend: Backend, _: GuestAddress) -> Result<Box<dyn Device>, BackendError> {
        match backend {
            Backend::Folder(server) => Ok(Box::new(SharedFolder::with(&self.tag, Some(server)))),
            Backend::Nothing => Ok(Box::new(SharedFolder::with(&self.tag, None))),
            other => Err(other.mismatch()),
        }
    }
}

impl Device for SharedFolder {
    fn kind(&self) -> u32 {
        KIND
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        // Without VIRTIO_FS_F_NOTIFICATION the server only sends replies.
        0
    }

    fn configuration(&self) -> Vec<u8> {
        // struct virtio_fs_config (section 5.11.4): the tag, padded with zeroes, and the number of request queues.
        let mut bytes = self.tag.clone().into_bytes();
        bytes.resize(TAG_MAX, 0);
        bytes.extend(1_u32.to_le_bytes());
        bytes
    }

    fn activate(&mut self, _: u64, _: &mut Queues, watcher: &Watcher) -> Result<(), DeviceError> {
        if let Some(server) = &self.server {
            self.watched = self.events();
            watcher
                .add(server.socket(), SERVER, self.watched)
                .map_err(|error| DeviceError::new(format!("cannot watch the server's socket: {error}")))?;
        }
        self.watcher = Some(watcher.clone());
        Ok(())
    }

    fn serve_inline(&mut self, queues: &mut Queues) -> Result<Progress, DeviceError> {
        let rest = self.take_requests(queues)?;
        self.notify(queues)?;
        // The event loop waits for the server, and disconnects one that has ended.
        let is_waiting = !self.unsent.is_empty() || self.ended.is_some();
        Ok(if is_waiting { Progress::Pending } else { rest })
    }

    fn serves_inline(&self) -> bool {
        true
    }

    fn serve(&mut self, event: Event, queues: &mut Queues) -> Result<(), DeviceError> {
        if let Event::Ready(..) = event {
            self.take_replies(queues)?;
            self.flush();
        }
        if self.take_requests(queues)? == Progress::Pending {
            queues.reschedule();
        }
        if let Some(error) = self.ended.take() {
            self.disconnect(error, queues)?;
            // Requests may be left in the queues.
            queues.reschedule();
        }
        self.watch();
        self.notify(queues)
    }

    fn reset(&mut self) {
        if let (Some(watcher), Some(server)) = (self.watcher.take(), &self.server) {
            watcher.remove(server.socket());
        }
        // Replies to pending requests will arrive and are dropped.
        self.pending.clear();
        self.incoming.target = None;
    }

    fn failure(&self) -> Option<String> {
        self.failure.clone()
    }
}

impl SharedFolder {
    fn notify(&self, queues: &mut Queues) -> Result<(), DeviceError> {
        for queue in [HIPRIO, REQUESTS] {
            if queues.is_ready(queue) {
                queues.notify(queue)?;
            }
        }
        Ok(())
    }
}
