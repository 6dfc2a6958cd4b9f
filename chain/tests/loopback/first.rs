//! The first checkpoint of a chain whose disks hold something already: what an earlier one that was interrupted has left, or
//! what they held as members before. Only the blocks in which some replica differs are sent.

use chain::blocks::{self, Answer, BLOCK, Digest};
use chain::{ClientEvent, Handover};
use diskbuf::Durability;

use crate::cluster::{Cluster, Owner, VM, committed, shape};
use crate::vm::Vm;

const SIZE: u64 = 4 << 20;
const BLOCKS: usize = (SIZE / BLOCK) as usize;

fn digests(vm: &Vm) -> Vec<Digest> {
    let blocks = vm.disk.chunks(BLOCK as usize);
    blocks.map(blocks::digest).collect()
}

/// Asks, and sends `limit` blocks of those that differ, as records of the checkpoint begun. Answers for each whether it was
/// said to be everywhere.
fn ask_and_send(vm: &Vm, owner: &Owner, limit: usize) -> Vec<bool> {
    owner.compare(0, 0, &digests(vm)).unwrap();
    let equal = match owner.next_event() {
        Some(ClientEvent::Compared {
            generation,
            epoch,
            answer:
                Answer {
                    disk: 0,
                    first: 0,
                    equal,
                },
        }) => {
            assert_eq!(
                (generation, epoch),
                (owner.connection.generation(), vm.epoch)
            );
            equal
        }
        other => panic!("instead of an answer: {other:?}"),
    };
    assert_eq!(equal.len(), BLOCKS);
    let differ = (0..BLOCKS).filter(|block| !equal[*block]);
    for block in differ.take(limit) {
        owner
            .disk(&vm.disk_record(block as u64 * BLOCK, BLOCK))
            .unwrap();
    }
    equal
}

fn differing(equal: &[bool]) -> Vec<usize> {
    (0..equal.len()).filter(|block| !equal[*block]).collect()
}

/// All but the disk, and the end.
fn finish(vm: &mut Vm, owner: &Owner) {
    let (pages, _) = vm.records(true);
    owner.pages(&pages).unwrap();
    owner.machine(&vm.machine()).unwrap();
    owner.end().unwrap();
}

fn begin(vm: &mut Vm, owner: &Owner) {
    vm.epoch = vm.epoch.next();
    owner.begin_over(vm.epoch).unwrap();
}

/// Flips a byte of that block behind a replica's back.
fn damage(cluster: &Cluster, host: usize, block: usize) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(cluster.hosts[host].data_dir().join("vm/disk0.img"))
        .unwrap();
    let (at, mut byte) = (block as u64 * BLOCK + 777, [0]);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

fn last_one(cluster: &mut Cluster, length: usize) -> Handover {
    cluster.take_over(length - 1)
}

#[test]
fn i3_an_interrupted_first_copy_goes_on_where_it_was() {
    let degrees = [Durability::Memory, Durability::Disk];
    for (length, durability) in [1, 2, 3, 2].into_iter().zip(degrees.into_iter().cycle()) {
        let mut cluster = Cluster::of_shape(length, 0, shape(SIZE), durability);
        let mut owner = cluster.connect();
        let mut vm = Vm::with_old_disk(SIZE);
        vm.disk[5 * BLOCK as usize..][..2 * BLOCK as usize].fill(0);

        // Nothing is there but zeros.
        begin(&mut vm, &owner);
        let equal = ask_and_send(&vm, &owner, 20);
        let (zero, rest) = (vec![5, 6], BLOCKS - 2);
        let found: Vec<_> = (0..BLOCKS).filter(|block| equal[*block]).collect();
        assert_eq!((found, differing(&equal).len()), (zero, rest));
        // What was sent is known to be there only once the chain says so; then it is interrupted.
        owner.compare(0, 0, &digests(&vm)).unwrap();
        assert!(matches!(
            owner.next_event(),
            Some(ClientEvent::Compared { .. })
        ));
        owner.connection.close();

        // Again, from the beginning. Meanwhile the guest has gone on, and hosts have lost blocks.
        cluster.anew(&(0..length).collect::<Vec<_>>());
        vm.disk[3 * BLOCK as usize + 5] ^= 1;
        damage(&cluster, 0, 9);
        damage(&cluster, length - 1, 11);
        owner.reconnect(&cluster.view);
        vm.epoch = checkpoint::Epoch::ZERO;
        begin(&mut vm, &owner);
        let equal = ask_and_send(&vm, &owner, BLOCKS);
        let mut expected = vec![3, 9, 11];
        expected.extend(22..BLOCKS);
        assert_eq!(differing(&equal), expected);
        // A write after the answer is streamed as any other.
        let at = 40 * BLOCK + 512;
        vm.disk[at as usize..][..512].fill(0xee);
        owner.disk(&vm.disk_record(at, 512)).unwrap();
        finish(&mut vm, &owner);
        committed(&owner, vm.epoch, cluster.view.generation);
        // It can be resumed from once output is held.
        vm.checkpoint(&owner, false);
        committed(&owner, vm.epoch, cluster.view.generation);
        vm.check(&last_one(&mut cluster, length));
    }
}

#[test]
fn a_chain_of_a_disk_it_does_not_have_says_that_nothing_is_there() {
    let cluster = Cluster::of_shape(2, 0, shape(SIZE), Durability::Disk);
    let owner = cluster.connect();
    let mut vm = Vm::with_old_disk(SIZE);
    begin(&mut vm, &owner);
    for (disk, first) in [(1, 0), (0, BLOCKS as u64), (0, u64::MAX)] {
        owner.compare(disk, first, &digests(&vm)[..3]).unwrap();
        match owner.next_event() {
            Some(ClientEvent::Compared { answer, .. }) => assert_eq!(answer.equal, [false; 3]),
            other => panic!("instead of an answer: {other:?}"),
        }
    }
    assert_eq!(cluster.hosts[1].server().status(VM).unwrap().failed, None);
}

#[test]
fn a_question_outside_of_a_first_checkpoint_has_no_effect() {
    let mut cluster = Cluster::of_shape(2, 0, shape(SIZE), Durability::Memory);
    let owner = cluster.connect();
    let mut vm = Vm::with_old_disk(SIZE);
    vm.checkpoint(&owner, true);
    committed(&owner, vm.epoch, cluster.view.generation);
    vm.live();
    vm.send_body(&owner, false).unwrap();
    owner.compare(0, 0, &digests(&vm)).unwrap();
    owner.end().unwrap();
    committed(&owner, vm.epoch, cluster.view.generation);
    vm.check(&last_one(&mut cluster, 2));
}
