//! The serial port, which is the guest's console. `vm-superio` implements the registers.

use crate::bus::{BusDevice, GuestRequest};
use crate::devices::console::ConsoleOutput;
use serde::{Deserialize, Serialize};
use std::io;
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// Raises an interrupt through an eventfd, which KVM delivers as an edge on the port's interrupt line.
#[derive(Debug)]
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Notifies the event loop that the guest has read all buffered input.
#[derive(Debug)]
struct Drained(EventFd);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // A write of an eventfd fails only when its counter overflows, in which case the eventfd is readable already.
        let _ = self.0.write(1);
    }
}

/// Offset of the interrupt enable register, and its bit for received data.
const INTERRUPT_ENABLE: u16 = 1;
const RECEIVED_DATA: u8 = 0x01;

/// The registers of a serial port: its complete state except for input that the guest has not read yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
}

/// A 16550A UART whose transmitter writes to a [`ConsoleOutput`].
#[derive(Debug)]
pub struct SerialPort {
    uart: Serial<Interrupt, Drained, ConsoleOutput>,
    /// Whether the guest has enabled the interrupt for received data. A driver clears the receive FIFO when it starts,
    /// so that input that is enqueued earlier would be lost.
    receiving: bool,
}

impl SerialPort {
    /// Creates a port that writes `interrupt` to raise its interrupt, and writes `drained` whenever its receive FIFO
    /// becomes empty or the guest enables the interrupt for received data.
    #[must_use]
    pub fn new(interrupt: EventFd, drained: EventFd, output: ConsoleOutput) -> Self {
        Self { uart: Serial::with_events(Interrupt(interrupt), Drained(drained), output), receiving: false }
    }

    /// Returns a copy of the registers.
    #[must_use]
    pub fn state(&self) -> State {
        let state = self.uart.state();
        State {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
        }
    }

    /// Creates a port with saved registers and an empty receive FIFO; the other arguments are those of [`Self::new`].
    ///
    /// # Errors
    /// When a pending interrupt cannot be raised.
    pub fn restored(
        state: &State,
        interrupt: EventFd,
        drained: EventFd,
        output: ConsoleOutput,
    ) -> io::Result<Self> {
        let [baud_divisor_low, baud_divisor_high] = state.divisor;
        let registers = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: Vec::new(),
        };
        let uart = Serial::from_state(&registers, Interrupt(interrupt), Drained(drained), output)
            .map_err(|error| io::Error::other(format!("{error:?}")))?;
        let mut this = Self { uart, receiving: false };
        this.update_receiving();
        Ok(this)
    }

    /// Free space of the receive FIFO in bytes; 0 until the guest enables the interrupt for received data.
    #[must_use]
    pub fn input_space(&self) -> usize {
        if self.receiving { self.uart.fifo_capacity() } else { 0 }
    }

    /// Updates [`Self::receiving`], and notifies the event loop when a driver enables the interrupt for received data.
    fn update_receiving(&mut self) {
        let receiving = self.uart.state().interrupt_enable & RECEIVED_DATA != 0;
        if receiving && !self.receiving {
            self.uart.events().in_buffer_empty();
        }
        self.receiving = receiving;
    }

    /// Enqueues input for the guest. Bytes beyond [`Self::input_space`] are dropped.
    pub fn put_input(&mut self, bytes: &[u8]) {
        // A port in loopback mode takes no input: the bytes are lost, as on a real line.
        let _ = self.uart.enqueue_raw_bytes(bytes);
    }

    /// The error that caused a loss of output, see [`ConsoleOutput::failure`].
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.uart.writer().failure()
    }

    /// The last lines of output, at most `lines` of them, oldest first.
    #[must_use]
    pub fn last_lines(&self, lines: usize) -> Vec<String> {
        self.uart.writer().last_lines(lines)
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        let register = offset.to_le_bytes()[0];
        for byte in data {
            *byte = self.uart.read(register);
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> Option<GuestRequest> {
        let register = offset.to_le_bytes()[0];
        for &byte in data {
            // An error means that an interrupt could not be raised; the guest's driver polls as well.
            let _ = self.uart.write(register, byte);
        }
        if offset == INTERRUPT_ENABLE {
            self.update_receiving();
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn port() -> (SerialPort, EventFd, EventFd) {
        let (interrupt, drained) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
        let output = ConsoleOutput::new(None, Arc::default());
        let port = SerialPort::new(interrupt.try_clone().unwrap(), drained.try_clone().unwrap(), output);
        (port, interrupt, drained)
    }

    fn read(port: &mut SerialPort, offset: u16) -> u8 {
        let mut data = [0xff];
        port.read(offset, &mut data);
        data[0]
    }

    // Register numbers and bits restate the 16550A datasheet: 0 data, 1 interrupt enable,
    // 5 line status with bit 0 "data ready" and bits 5 and 6 "transmitter empty".

    #[test]
    fn output_is_always_possible_and_reaches_the_console() {
        let (mut port, _, _) = port();
        assert_eq!(read(&mut port, 5), 0x60);
        for byte in b"hi\n" {
            port.write(0, &[*byte]);
        }
        assert_eq!(port.last_lines(1), ["hi"]);
    }

    #[test]
    fn input_raises_an_interrupt_and_draining_it_notifies_the_event_loop() {
        let (mut port, interrupt, drained) = port();
        assert_eq!(port.input_space(), 0, "the guest does not receive yet");
        port.write(1, &[0x01]);
        assert_eq!(drained.read().unwrap(), 1, "the guest begins to receive");
        let space = port.input_space();
        port.put_input(b"ab");
        assert_eq!(port.input_space(), space - 2);
        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(read(&mut port, 5) & 1, 1);
        assert_eq!([read(&mut port, 0), read(&mut port, 0)], *b"ab");
        assert_eq!(drained.read().unwrap(), 1);
        assert_eq!(read(&mut port, 5) & 1, 0);
    }

    #[test]
    fn input_beyond_the_fifo_is_dropped() {
        let (mut port, _, _) = port();
        port.write(1, &[0x01]);
        let space = port.input_space();
        assert_eq!(space, 64);
        port.put_input(&vec![b'x'; space]);
        assert_eq!(port.input_space(), 0);
        port.put_input(b"y");
        assert_eq!(port.input_space(), 0);
    }
}
