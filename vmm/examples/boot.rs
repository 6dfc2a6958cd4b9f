//! Boots a kernel on a bare machine, waits for a text on its console, then moves it into a second machine by capture
//! and restore and waits for more of the console there.
//!
//! `boot KERNEL INITRD VCPUS MEM_MIB CMDLINE FIRST_TEXT SECOND_TEXT [MOVES]`
//!
//! Ends with status 0 once SECOND_TEXT has come from each machine the guest was moved into (MOVES of them, 1 unless
//! given). The console goes to standard output.

use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};
use vmm::{BootFile, BootSpec, KernelSource, RamFiles, RamLayout, Vm, VmSpec};

/// How long a text may take to appear: a kernel under two layers of emulation is slow.
const PATIENCE: Duration = Duration::from_secs(180);

#[derive(Clone, Default)]
struct Console(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Write for Console {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let mut out = std::io::stdout();
        out.write_all(data)?;
        out.flush()?;
        self.0
            .0
            .lock()
            .expect("no panic holds it")
            .extend_from_slice(data);
        self.0.1.notify_all();
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Console {
    /// Waits for `text`, while the guest lives.
    fn wait(&self, text: &str, vm: &Vm) -> Result<(), String> {
        let begun = Instant::now();
        let mut seen = self.0.0.lock().expect("no panic holds it");
        loop {
            if String::from_utf8_lossy(&seen).contains(text) {
                return Ok(());
            }
            if let Ok(event) = vm.events().try_recv() {
                return Err(event.to_string());
            }
            if begun.elapsed() > PATIENCE {
                return Err(format!("no {text:?} on the console within {PATIENCE:?}"));
            }
            seen = self
                .0
                .1
                .wait_timeout(seen, Duration::from_millis(200))
                .expect("no panic holds it")
                .0;
        }
    }
}

fn machine(vcpus: u8, layout: &RamLayout, ram: RamFiles) -> Result<(Vm, Console), String> {
    let console = Console::default();
    let spec = VmSpec {
        cpu: Default::default(),
        vcpus,
        ram: layout.clone(),
        net: Vec::new(),
        disks: Vec::new(),
        rng: true,
        serial_out: Box::new(console.clone()),
        serial_in: None,
    };
    Ok((Vm::new(spec, ram).map_err(|e| e.to_string())?, console))
}

fn run() -> Result<(), String> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (fixed, moves) = match args.len() {
        7 => (&args[..], 1),
        8 => (
            &args[..7],
            args[7].parse().map_err(|_| "MOVES is not a number")?,
        ),
        _ => {
            return Err(
                "boot KERNEL INITRD VCPUS MEM_MIB CMDLINE FIRST_TEXT SECOND_TEXT [MOVES]"
                    .to_owned(),
            );
        }
    };
    let vcpus: u8 = fixed[2].parse().map_err(|_| "VCPUS is not a number")?;
    let mib: u64 = fixed[3].parse().map_err(|_| "MEM_MIB is not a number")?;
    // A hole: half of the memory in a second slot.
    let layout = RamLayout::new(mib << 20, Some(mib << 19)).map_err(|e| e.to_string())?;
    let ram = RamFiles::create(&layout).map_err(|e| e.to_string())?;
    let (mut vm, mut console) = machine(vcpus, &layout, ram)?;
    let boot = BootSpec {
        kernel: KernelSource::File(BootFile::from(&fixed[0])),
        initrd: (!fixed[1].is_empty()).then(|| BootFile::from(&fixed[1])),
        cmdline: fixed[4].clone(),
    };
    vm.boot(&boot).map_err(|e| e.to_string())?;
    vm.resume();
    console.wait(&fixed[5], &vm)?;
    for round in 1..=moves {
        let begun = Instant::now();
        vm.pause().map_err(|e| e.to_string())?;
        let paused = begun.elapsed();
        let state = vm.capture().map_err(|e| e.to_string())?;
        let captured = begun.elapsed();
        let files = RamFiles::create(&layout).map_err(|e| e.to_string())?;
        copy(&vm, &layout, &files)?;
        vm.stop();
        let (next, line) = machine(vcpus, &layout, files)?;
        let begun = Instant::now();
        next.restore(&state).map_err(|e| e.to_string())?;
        let restored = begun.elapsed();
        println!(
            "\n[move {round}: paused in {paused:?}, captured by {captured:?}, restored in {restored:?}]"
        );
        next.resume();
        line.wait(&fixed[6], &next)?;
        (vm, console) = (next, line);
    }
    drop(console);
    println!("\n[the guest went on after {moves} moves]");
    vm.stop();
    Ok(())
}

fn copy(vm: &Vm, layout: &RamLayout, files: &RamFiles) -> Result<(), String> {
    let to = vmm::memory::map(layout, files).map_err(|e| e.to_string())?;
    let mut buffer = vec![0; 1 << 20];
    for region in vm.memory().iter() {
        for offset in (0..region.len()).step_by(buffer.len()) {
            let part = &mut buffer[..(region.len() - offset).min(1 << 20) as usize];
            let at = vm_memory::GuestAddress(region.start_addr().0 + offset);
            vm.memory()
                .read_slice(part, at)
                .map_err(|e| e.to_string())?;
            to.write_slice(part, at).map_err(|e| e.to_string())?;
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("boot: {error}");
            ExitCode::FAILURE
        }
    }
}
