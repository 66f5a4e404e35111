//! Pausing vCPUs between two entries into the guest, and reading their states meanwhile.

use super::{KvmError, VcpuState};
use crate::bus::lock;
use crate::timeline::Instant;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread::{self, ThreadId};
use std::time::Duration;

/// Where the vCPUs of a machine wait while it is paused.
#[derive(Debug, Default)]
pub(crate) struct Pause {
    /// Whether the mode is another than [`Mode::Run`].
    is_set: AtomicBool,
    state: Mutex<State>,
    /// The mode has changed, or a vCPU has saved its state.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    mode: Mode,
    /// vCPUs that wait.
    waiting: usize,
    /// The thread of the vCPU that paused the others, for a snapshot.
    marked_by: Option<ThreadId>,
    saved: Vec<SavedVcpu>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Run,
    /// The vCPUs wait.
    Pause,
    /// Each vCPU saves its state, and waits again.
    Save,
}

/// Why a vCPU does not wait any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waited {
    /// The machine was not paused.
    No,
    /// The machine continues.
    Resumed,
    /// The vCPU saves its state, and waits again.
    Save,
}

/// The saved state of a vCPU.
#[derive(Debug)]
pub(crate) struct SavedVcpu {
    pub(crate) id: usize,
    pub(crate) state: Result<VcpuState, KvmError>,
    /// When the state was read.
    pub(crate) at: Instant,
}

impl Pause {
    /// Makes each vCPU wait before it enters the guest again.
    pub(crate) fn set(&self) {
        self.pause(None);
    }

    /// The same for a snapshot, by the thread of a vCPU.
    pub(crate) fn mark(&self) {
        self.pause(Some(thread::current().id()));
    }

    fn pause(&self, marked_by: Option<ThreadId>) {
        let mut state = lock(&self.state);
        state.marked_by = marked_by.or(state.marked_by);
        if state.mode == Mode::Run {
            state.mode = Mode::Pause;
        }
        self.is_set.store(true, Ordering::Release);
    }

    /// Whether the machine is paused for a snapshot.
    pub(crate) fn is_marked(&self) -> bool {
        lock(&self.state).marked_by.is_some()
    }

    /// Makes `count` vCPUs, which wait, save their states and wait again. Returns the states that were saved within the limit, and the
    /// thread that called [`Self::mark`].
    pub(crate) fn save_all(&self, count: usize, limit: Duration) -> (Vec<SavedVcpu>, Option<ThreadId>) {
        let mut state = lock(&self.state);
        state.saved.clear();
        state.mode = Mode::Save;
        self.changed.notify_all();
        let is_incomplete = |state: &mut State| state.saved.len() < count;
        let waited = self.changed.wait_timeout_while(state, limit, is_incomplete);
        let Ok((mut state, _)) = waited else { return (Vec::new(), None) };
        state.mode = Mode::Pause;
        (std::mem::take(&mut state.saved), state.marked_by.take())
    }

    /// Takes the state of a vCPU, which then waits.
    pub(super) fn save(&self, vcpu: SavedVcpu) {
        lock(&self.state).saved.push(vcpu);
        self.changed.notify_all();
    }

    /// Lets the vCPUs continue.
    pub(crate) fn clear(&self) {
        let mut state = lock(&self.state);
        (state.mode, state.marked_by) = (Mode::Run, None);
        self.is_set.store(false, Ordering::Release);
        drop(state);
        self.changed.notify_all();
    }

    /// The number of vCPUs that wait.
    pub(crate) fn waiting(&self) -> usize {
        // Those that wait after the pause was cleared are about to continue.
        let state = lock(&self.state);
        if state.mode == Mode::Run { 0 } else { state.waiting }
    }

    /// Waits while the machine is paused, and until the vCPU is to save its state, unless it has.
    pub(super) fn wait(&self, has_saved: bool) -> Waited {
        if !self.is_set.load(Ordering::Acquire) {
            return Waited::No;
        }
        let mut state = lock(&self.state);
        state.waiting += 1;
        let waited = loop {
            match state.mode {
                Mode::Run => break Waited::Resumed,
                Mode::Save if !has_saved => break Waited::Save,
                Mode::Pause | Mode::Save => match self.changed.wait(state) {
                    Ok(guard) => state = guard,
                    // A lock whose holder panicked ends the wait.
                    Err(_) => return Waited::Resumed,
                },
            }
        };
        state.waiting -= 1;
        waited
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpus_wait_until_the_pause_is_cleared() {
        let pause = Pause::default();
        assert_eq!(pause.wait(false), Waited::No, "a machine that is not paused holds no vCPU");
        pause.set();
        std::thread::scope(|scope| {
            let vcpus = [scope.spawn(|| pause.wait(false)), scope.spawn(|| pause.wait(false))];
            while pause.waiting() < vcpus.len() {
                std::thread::yield_now();
            }
            assert!(vcpus.iter().all(|vcpu| !vcpu.is_finished()));
            pause.clear();
            assert!(vcpus.into_iter().all(|vcpu| vcpu.join().unwrap() == Waited::Resumed));
        });
        pause.set();
        assert_eq!(pause.waiting(), 0);
    }

    #[test]
    fn paused_vcpus_save_their_states_once_and_wait_again() {
        const LONG: Duration = Duration::from_secs(60);
        let pause = Pause::default();
        let run = |id| {
            let pause = &pause;
            move || {
                if id == 1 {
                    pause.mark();
                }
                while pause.wait(false) != Waited::Save {}
                let state = Err(KvmError::Ioctl { what: "test", source: std::io::ErrorKind::Other.into() });
                pause.save(SavedVcpu { id, state, at: Instant::now() });
                pause.wait(true)
            }
        };
        std::thread::scope(|scope| {
            let vcpus = [scope.spawn(run(0)), scope.spawn(run(1))];
            while pause.waiting() < vcpus.len() {
                std::thread::yield_now();
            }
            assert!(pause.is_marked());
            let (saved, marked_by) = pause.save_all(vcpus.len(), LONG);
            let mut ids: Vec<_> = saved.iter().map(|vcpu| vcpu.id).collect();
            ids.sort_unstable();
            assert_eq!((ids, marked_by), (vec![0, 1], Some(vcpus[1].thread().id())));
            assert!(!pause.is_marked() && vcpus.iter().all(|vcpu| !vcpu.is_finished()));
            // One that does not run any more saves nothing.
            assert!(pause.save_all(1, Duration::from_millis(10)).0.is_empty());
            pause.clear();
            assert!(vcpus.into_iter().all(|vcpu| vcpu.join().unwrap() == Waited::Resumed));
        });
    }
}
