//! One thread per VM: takes what comes into the VM's mailbox, lets the machine decide, and carries out what it decides.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use chain::{Handover, Kept, VmRecord};
use checkpoint::VmId;

use super::child::ChildHandle;
use super::copy::DiskCopy;
use super::env::{Env, lock};
use super::slow;
use crate::child::monotonic_us;
use crate::child::proto::{Activate, FromChild, Owns, ToChild};
use crate::epoch::EpochStats;
use crate::epoch::figures::Figures;
use crate::host::{Answered, Disks, Effect, Input, Loss, Machine, Order, Report, Summary, Tell};

/// What comes into a VM's mailbox.
pub(super) enum Mail {
    /// For the machine.
    Input(Box<Input>),
    /// An administrator's order, and who waits for its outcome.
    Order(Order, Sender<Result<Answered, String>>),
    /// A process says something, or has ended.
    Child(u64, Option<FromChild>),
    /// A process has been started, or not.
    Spawned(u64, Result<Arc<ChildHandle>, String>),
    /// This host's copy of the disks.
    Disks(Result<DiskCopy, String>),
}

/// What others may see of a VM without waiting for its thread.
pub(super) struct Shown {
    pub summary: Mutex<Summary>,
    pub child: Mutex<Option<Arc<ChildHandle>>>,
    /// How an owner is doing.
    pub told: Mutex<Option<Told>>,
    pub waiting: Mutex<Waiting>,
    /// The generation followed; what was begun in an older one ends.
    generation: AtomicU64,
}

/// What an owner's process says of itself from time to time.
#[derive(Clone)]
pub(super) struct Told {
    pub figures: Figures,
    /// What is wrong with its disks, in words.
    pub disks: Vec<String>,
    /// When it said so.
    pub at: Instant,
}

/// Questions to the process that somebody waits for.
#[derive(Default)]
pub(super) struct Waiting {
    pub stats: Vec<Sender<EpochStats>>,
    pub inspected: Vec<Sender<Result<Vec<vmm::VcpuReport>, String>>>,
}

impl Shown {
    pub fn new(machine: &Machine) -> Arc<Self> {
        Arc::new(Self {
            summary: Mutex::new(machine.summary()),
            child: Mutex::default(),
            told: Mutex::default(),
            waiting: Mutex::default(),
            generation: AtomicU64::new(machine.generation().0),
        })
    }
}

/// A VM on this host.
pub(super) struct Runner {
    env: Arc<Env>,
    machine: Machine,
    shown: Arc<Shown>,
    /// To itself, for what is done on the side.
    mail: Sender<Mail>,
    /// Of the newest process, whether it exists yet or not; reports of others are not heeded.
    process: u64,
    /// Killed, and perhaps not gone yet.
    before: Option<Arc<ChildHandle>>,
    /// A process is being started; what is to be started after it.
    spawning: bool,
    next: Option<Effect>,
    handover: Option<Handover>,
    kept: Arc<Kept>,
    disks: Option<DiskCopy>,
    tickets: BTreeMap<u64, Sender<Result<Answered, String>>>,
    ticket: u64,
    over: bool,
}

impl Runner {
    pub fn new(env: Arc<Env>, machine: Machine, shown: Arc<Shown>, mail: Sender<Mail>) -> Self {
        Self {
            env,
            machine,
            shown,
            mail,
            process: 0,
            before: None,
            spawning: false,
            next: None,
            handover: None,
            kept: Arc::default(),
            disks: None,
            tickets: BTreeMap::new(),
            ticket: 0,
            over: false,
        }
    }

    /// The ticket of an order that was given before the VM had a thread.
    pub fn expect_answer(&mut self, waiting: Sender<Result<Answered, String>>) -> u64 {
        self.ticket += 1;
        self.tickets.insert(self.ticket, waiting);
        self.ticket
    }

    /// The effects of the machine's making, then whatever comes, until nothing is left to decide.
    pub fn run(mut self, begun: Vec<Effect>, mailbox: &Receiver<Mail>) {
        self.carry_out_all(begun);
        while !self.over {
            let mail = match self.machine.wake_at() {
                None => mailbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => {
                    let wait = Duration::from_micros(at.saturating_sub(monotonic_us()));
                    mailbox.recv_timeout(wait)
                }
            };
            match mail {
                Ok(mail) => self.take(mail),
                Err(RecvTimeoutError::Timeout) => self.step(Input::Tick),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn take(&mut self, mail: Mail) {
        match mail {
            Mail::Input(input) => self.step(*input),
            Mail::Order(order, waiting) => {
                let ticket = self.expect_answer(waiting);
                self.step(Input::Ordered(ticket, order));
            }
            Mail::Child(process, message) if process == self.process => self.child_says(message),
            Mail::Child(..) => {}
            Mail::Spawned(process, result) => self.spawned(process, result),
            Mail::Disks(result) => {
                let found = result.map(|copy| self.disks = Some(copy));
                self.step(Input::DisksFound(found));
            }
        }
    }

    fn step(&mut self, input: Input) {
        let mut effects = Vec::new();
        self.machine.step(monotonic_us(), input, &mut effects);
        self.carry_out_all(effects);
    }

    /// In order; what is answered at once is answered before the rest is done. What has been decided is shown first: whoever
    /// is told of an outcome, or sees an effect, must not find the state before it.
    fn carry_out_all(&mut self, effects: Vec<Effect>) {
        let generation = self.machine.generation().0;
        self.shown.generation.store(generation, Ordering::Release);
        *lock(&self.shown.summary) = self.machine.summary();
        for effect in effects {
            self.carry_out(effect);
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        let vm = self.machine.vm();
        match effect {
            Effect::Freeze => {
                let frozen = self.env.replicas.freeze(vm).map_err(|e| e.to_string());
                self.step(Input::Frozen(frozen));
            }
            Effect::Unfreeze => drop(self.env.replicas.unfreeze(vm)),
            Effect::Adopt(view) => drop(self.env.replicas.adopt(view)),
            Effect::HandOver(view) => {
                let result = match self.env.replicas.hand_over(&view) {
                    Ok(mut handover) => {
                        self.kept = Arc::new(std::mem::take(&mut handover.kept));
                        let mark = handover.mark;
                        self.handover = Some(handover);
                        Ok(mark)
                    }
                    Err(e) => Err(e.to_string()),
                };
                self.step(Input::HandedOver(result));
            }
            Effect::RemoveReplica(generation) => self.env.replicas.remove(vm, generation),
            Effect::Decline(generation, why) => self.env.replicas.decline(vm, generation, why),
            Effect::StandBy(_) | Effect::Boot(..) => self.spawn(effect),
            Effect::FindProcess => {
                let adopted = self.adopt();
                self.step(Input::Adopted(adopted));
            }
            Effect::Activate { view, mark } => {
                let Some(handover) = self.handover.take() else {
                    return;
                };
                self.tell(&ToChild::Activate(Box::new(Activate {
                    view,
                    mark,
                    machine: handover.machine,
                    disks: handover.disks,
                })));
            }
            Effect::Tell(what) => self.tell(&match what {
                Tell::Protect(view) => ToChild::Protect(Box::new(view)),
                Tell::Freeze => ToChild::Freeze,
                Tell::HandOver => ToChild::HandOver,
                Tell::RunOn => ToChild::RunOn,
                Tell::Epochs(epochs) => ToChild::Epochs(epochs),
                Tell::Reset => ToChild::Reset,
                Tell::PowerButton { reboot } => ToChild::PowerButton { reboot },
            }),
            Effect::Kill => self.kill(),
            Effect::Bury => {
                let before = self.before.clone();
                self.aside("bury", move |_| {
                    if let Err(why) = slow::wait_gone(before.as_deref()) {
                        tracing::error!("{why}");
                    }
                    Some(Input::Buried)
                });
            }
            Effect::Propose { ask, command } => self.aside("ask-master", move |env| {
                let result = slow::propose(env, &command);
                Some(Input::Proposed { ask, result })
            }),
            Effect::Read => self.aside("ask-master", move |env| {
                let records = env.master.read().ok()?.records;
                let record = records.into_iter().find(|record| record.view.vm == vm)?;
                Some(Input::Decided(record))
            }),
            Effect::Probe(members) => {
                let view = self.machine.view().clone();
                self.aside("probe", move |env| {
                    Some(Input::Probed(slow::probe(env, &view, &members)))
                });
            }
            Effect::Survey(view) => self.aside("survey", move |env| {
                Some(Input::Surveyed(slow::survey(env, &view)))
            }),
            Effect::Yield(view) => self.aside("yield", move |env| {
                slow::yield_to_head(env, &view);
                None
            }),
            Effect::Bridge { view, mark } => {
                let (kept, shown) = (self.kept.clone(), self.shown.clone());
                self.aside("bridge", move |env| {
                    let result = slow::bridge(env, &view, mark, &kept, &shown.generation);
                    let generation = view.generation;
                    Some(Input::Bridged { generation, result })
                });
            }
            Effect::FindDisks(record) => self.find_disks(record),
            Effect::Say(kind, text) => self.env.events.add(kind, self.machine.name(), text),
            Effect::Answer(ticket, answer) => {
                if let Some(waiting) = self.tickets.remove(&ticket) {
                    let _ = waiting.send(answer);
                }
            }
            Effect::Forget => self.over = true,
        }
    }

    /// Does something that takes its time on a thread of its own; without one, here: then only this VM waits.
    fn beside(&self, name: &str, act: impl FnOnce(&Env) -> Option<Mail> + Send + 'static) {
        let (env, mail) = (self.env.clone(), self.mail.clone());
        let act = Arc::new(Mutex::new(Some(act)));
        let work = {
            let act = act.clone();
            move || {
                let act = lock(&act).take();
                if let Some(outcome) = act.and_then(|act| act(&env)) {
                    let _ = mail.send(outcome);
                }
            }
        };
        if let Err(e) = std::thread::Builder::new().name(name.into()).spawn(work) {
            tracing::warn!("{}: starting a thread: {e}", self.machine.name());
            let act = lock(&act).take();
            if let Some(outcome) = act.and_then(|act| act(&self.env)) {
                let _ = self.mail.send(outcome);
            }
        }
    }

    fn aside(&self, name: &str, act: impl FnOnce(&Env) -> Option<Input> + Send + 'static) {
        self.beside(name, |env| {
            act(env).map(|input| Mail::Input(Box::new(input)))
        });
    }

    /// Not before a process that is being started is there, or is not: it has the disks.
    fn find_disks(&mut self, record: VmRecord) {
        if self.spawning {
            self.next = Some(Effect::FindDisks(record));
            return;
        }
        let before = self.before.clone();
        self.beside("find-disks", move |env| {
            // The process before may have them open still.
            let free = slow::wait_gone(before.as_deref());
            Some(Mail::Disks(
                free.and_then(|()| DiskCopy::find(env, &record)),
            ))
        });
    }

    /// A process of this VM that an agent before has left running.
    fn adopt(&mut self) -> Option<Owns> {
        let found = lock(&self.env.found).remove(&self.machine.vm())?;
        self.process += 1;
        let (process, mail) = (self.process, self.mail.clone());
        let reports = move |message| {
            let _ = mail.send(Mail::Child(process, message));
        };
        match ChildHandle::adopt(found.socket, found.pid, found.pidfd, reports) {
            Ok(child) => {
                *lock(&self.shown.child) = Some(child);
                Some(found.owns)
            }
            Err(e) => {
                tracing::error!("{}: its process cannot be heard: {e}", self.machine.name());
                None
            }
        }
    }

    /// Starts a process, once the one before is started or not.
    fn spawn(&mut self, effect: Effect) {
        if self.spawning {
            self.next = Some(effect);
            return;
        }
        self.spawning = true;
        self.process += 1;
        let (process, mail) = (self.process, self.mail.clone());
        let reports: slow::Reports = Box::new(move |message| {
            let _ = mail.send(Mail::Child(process, message));
        });
        let before = self.before.take();
        let disks = self.disks.take();
        self.beside("spawn", move |env| {
            let result = match effect {
                Effect::Boot(record, from) => {
                    let generation = record.view.generation;
                    let disks = match (from, disks) {
                        (Disks::Configured, _) | (Disks::Found, None) => Ok(None),
                        (Disks::Found, Some(copy)) => copy.open(generation),
                    };
                    disks.and_then(|disks| {
                        slow::boot(env, &record, disks, before.as_deref(), reports)
                    })
                }
                Effect::StandBy(record) => slow::stand_by(env, &record, before.as_deref(), reports),
                _ => Err("it is no process".into()),
            };
            Some(Mail::Spawned(process, result))
        });
    }

    fn spawned(&mut self, process: u64, result: Result<Arc<ChildHandle>, String>) {
        self.spawning = false;
        if process == self.process {
            let result = result.map(|child| {
                *lock(&self.shown.child) = Some(child);
            });
            self.step(Input::Spawned(result));
        } else if let Ok(child) = result {
            // Nobody wants it any more.
            child.kill();
            self.before = Some(child);
            let generation = self.machine.generation();
            self.env.replicas.remove(self.machine.vm(), generation);
        }
        if !self.spawning
            && let Some(next) = self.next.take()
        {
            self.carry_out(next);
        }
    }

    fn kill(&mut self) {
        // Whatever it says from here on, or is about to be, is of no account.
        self.process += 1;
        self.next = None;
        *lock(&self.shown.told) = None;
        let child = lock(&self.shown.child).take();
        if let Some(child) = child {
            child.kill();
            self.before = Some(child);
        }
    }

    fn tell(&self, message: &ToChild) {
        let child = lock(&self.shown.child).clone();
        let Some(child) = child else { return };
        if let Err(e) = child.send(message) {
            // Its end is reported by its own way.
            tracing::warn!("{}: the VM's process is gone: {e}", self.machine.name());
        }
    }

    fn child_says(&mut self, message: Option<FromChild>) {
        let report = match message {
            None => Report::Gone,
            Some(FromChild::Ready) => Report::Ready,
            Some(FromChild::Activated {
                restored_us,
                running_us,
                ..
            }) => Report::Activated {
                restored_us,
                running_us,
            },
            Some(message @ FromChild::Protected { .. }) => match protected(&message) {
                Some(report) => report,
                None => return,
            },
            Some(FromChild::Refused { generation }) => Report::Refused { generation },
            Some(FromChild::ChainLost {
                generation,
                host,
                why,
                unfit,
            }) => Report::Lost(Loss {
                generation,
                host,
                unfit,
                why,
            }),
            Some(FromChild::AttemptFailed { generation, why }) => {
                Report::AttemptFailed { generation, why }
            }
            Some(FromChild::JoinerReady { generation }) => Report::JoinerReady { generation },
            Some(FromChild::Rebooted { how }) => Report::Rebooted { how },
            Some(FromChild::HandedOver { epoch }) => Report::HandedOver { epoch },
            Some(FromChild::GuestEnded { end, how }) => Report::Ended { end, how },
            Some(FromChild::Fatal(why) | FromChild::GiveUp { why }) => Report::GiveUp { why },
            Some(FromChild::Said { kind, text }) => {
                return self.env.events.add(kind, self.machine.name(), text);
            }
            // Said first of all, before anybody listens here.
            Some(FromChild::Owns(_)) => return,
            Some(FromChild::Figures { figures, disks }) => {
                let at = Instant::now();
                *lock(&self.shown.told) = Some(Told { figures, disks, at });
                return;
            }
            Some(FromChild::Stats(stats)) => {
                for waiting in lock(&self.shown.waiting).stats.drain(..) {
                    let _ = waiting.send((*stats).clone());
                }
                return;
            }
            Some(FromChild::Inspected(reports)) => {
                for waiting in lock(&self.shown.waiting).inspected.drain(..) {
                    let _ = waiting.send(reports.clone());
                }
                return;
            }
        };
        self.step(Input::Report(report));
    }
}

fn protected(message: &FromChild) -> Option<Report> {
    let FromChild::Protected {
        generation,
        epoch,
        sync_ms,
        sync,
    } = message
    else {
        return None;
    };
    let had = sync
        .as_ref()
        .filter(|sync| sync.disk_equal > 0)
        .map(|sync| {
            let (had, total) = (sync.disk_equal >> 20, sync.disk_total >> 20);
            format!("; of the disks' {total} MiB, {had} MiB were there already")
        });
    let text = format!(
        "protected from checkpoint {epoch} on (generation {generation}, synchronised in {sync_ms} ms{})",
        had.unwrap_or_default()
    );
    Some(Report::Protected {
        generation: *generation,
        text,
    })
}

/// Events of the server that concern a VM.
pub(super) fn of_server(event: chain::ServerEvent) -> (VmId, Input) {
    match event {
        chain::ServerEvent::Suspect { vm, silence_ms } => (vm, Input::Suspected { silence_ms }),
        chain::ServerEvent::Failed { vm, why } => (vm, Input::ReplicaFailed { why }),
    }
}
