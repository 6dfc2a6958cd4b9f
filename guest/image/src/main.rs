//! The probe guest's image. See docs/probe-guest.md.
#![no_std]
#![no_main]

mod boot;
mod cell;
mod irq;
mod load;
mod params;
#[path = "../../src/proto.rs"]
#[allow(dead_code)] // the client's half
mod proto;
mod rt;
mod serial;
mod server;
mod stack;
mod store;
mod time;
mod virtio;

use load::Load;
use params::Params;
use server::{Server, State};
use stack::Stack;
use store::Store;
use time::Clock;

/// The network and the disk are looked after at least this often under load, microseconds.
const POLL_US: u64 = 200;
/// The longest sleep, microseconds: bounds what a lost interrupt costs and the clock's step.
const SLEEP_US: u64 = 20_000;
/// The shortest sleep, microseconds. smoltcp says "at once" while no transmit buffer is free; that is no reason to spin.
const SLEEP_MIN_US: u64 = 50;
/// How long to look for more after something happened before going to sleep, microseconds. Waking up costs about as much
/// (interrupt, two trips through ring 0); a client that asks, gets its answer and asks again is served without it.
const LINGER_US: u64 = 150;

/// Ring 3 begins here. `params` is the physical address of Linux's boot_params.
#[unsafe(no_mangle)]
pub extern "C" fn rust_main(params: u64) -> ! {
    log!("in ring 3, version {}", env!("CARGO_PKG_VERSION"));
    let params = Params::read(params);
    irq::init();
    let mut clock = Clock::new();
    let store = Store::new(&mut clock);
    let load = Load::new(&params);
    let stack = Stack::new(&params, clock.now_us());
    log!("ready");
    run(clock, stack, State { store, load })
}

fn run(mut clock: Clock, mut stack: Option<Stack>, mut state: State) -> ! {
    let (mut server, mut sockets) = Server::new();
    let mut active_us = 0;
    loop {
        let now = clock.now_us();
        let mut active = false;
        if let Some(s) = &mut stack {
            active |= s.ingress(now, &mut sockets);
        }
        active |= state.store.pending();
        server.poll(&mut sockets, &mut state, now);
        if let Some(s) = &mut stack {
            active |= s.egress(now, &mut sockets);
        }
        if active {
            active_us = now;
        }
        let pending = |stack: &Option<Stack>, state: &State| {
            stack.as_ref().is_some_and(Stack::pending) || state.store.pending()
        };
        if state.load.active() {
            let (from, most) = (time::tsc(), clock.ticks(POLL_US));
            while time::tsc().wrapping_sub(from) < most && !pending(&stack, &state) {
                state.load.step();
            }
            continue;
        }
        if now - active_us < LINGER_US {
            core::hint::spin_loop();
            continue;
        }
        irq::prepare_sleep();
        state.store.interrupts(true);
        if let Some(s) = &mut stack {
            s.interrupts(true);
        }
        if !pending(&stack, &state) {
            let delay = stack
                .as_mut()
                .and_then(|s| s.delay_us(now, &sockets))
                .unwrap_or(SLEEP_US);
            irq::sleep(delay.clamp(SLEEP_MIN_US, SLEEP_US));
        }
        state.store.interrupts(false);
        if let Some(s) = &mut stack {
            s.interrupts(false);
        }
    }
}
