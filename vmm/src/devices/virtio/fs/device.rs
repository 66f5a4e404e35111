//! The device as its transport sees it.

use super::{HIPRIO, KIND, QUEUE_SIZES, REQUESTS, SERVER, SharedFolder, TAG_MAX};
use crate::devices::virtio::{Broken, Device, Event, Left, Queues, Watcher};

impl Device for SharedFolder {
    fn kind(&self) -> u32 {
        KIND
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        // Without VIRTIO_FS_F_NOTIFICATION the server speaks only when it is asked.
        0
    }

    fn configuration(&self) -> Vec<u8> {
        // struct virtio_fs_config (section 5.11.4): the tag, padded with zeroes, and the number of request queues.
        let mut bytes = self.tag.clone().into_bytes();
        bytes.resize(TAG_MAX, 0);
        bytes.extend(1_u32.to_le_bytes());
        bytes
    }

    fn activate(&mut self, _: u64, _: &mut Queues, watcher: &Watcher) -> Result<(), Broken> {
        if let Some(server) = &self.server {
            watcher
                .add(server.socket(), SERVER, self.events())
                .map_err(|error| Broken::because(format!("its server cannot be watched: {error}")))?;
        }
        self.watcher = Some(watcher.clone());
        Ok(())
    }

    fn serve_at_once(&mut self, queues: &mut Queues) -> Result<Left, Broken> {
        let left = self.take_requests(queues)?;
        self.notify(queues)?;
        Ok(left)
    }

    fn serves_at_once(&self) -> bool {
        true
    }

    fn serve(&mut self, event: Event, queues: &mut Queues) -> Result<(), Broken> {
        if let Event::Ready(..) = event {
            self.take_replies(queues)?;
            if let Err(lost) = self.flush() {
                self.lose(lost, queues)?;
            }
        }
        if self.take_requests(queues)? == Left::Something {
            queues.yield_turn();
        }
        self.notify(queues)
    }

    fn reset(&mut self) {
        if let (Some(watcher), Some(server)) = (self.watcher.take(), &self.server) {
            watcher.remove(server.socket());
        }
        // What is on its way comes back and is for nobody.
        self.waiting.clear();
        self.incoming.target = None;
    }

    fn failure(&self) -> Option<String> {
        self.failure.clone()
    }
}

impl SharedFolder {
    fn notify(&self, queues: &mut Queues) -> Result<(), Broken> {
        for queue in [HIPRIO, REQUESTS] {
            if queues.is_ready(queue) {
                queues.notify(queue)?;
            }
        }
        Ok(())
    }
}
