//! Which chains can be.

use checkpoint::{Generation, HostId};

use super::Rejection;
use crate::view::{Member, View};

/// Most replicas in a chain.
pub const CHAIN_MAX: usize = 16;

/// The same replicas at the same addresses; since when they are members is not the asker's to know.
pub(super) fn same(a: &[Member], b: &[Member]) -> bool {
    a.len() == b.len()
        && a.iter()
            .zip(b)
            .all(|(a, b)| a.host == b.host && a.addr == b.addr)
}

/// The members of `chain`, each with the generation since which it is one.
pub(super) fn entered(chain: &[Member], view: &View, anew: bool, now: Generation) -> Vec<Member> {
    let since = |host: &HostId| match view.position(host) {
        Some(position) if !anew => view.chain[position].since,
        _ => now,
    };
    chain
        .iter()
        .map(|member| Member {
            since: since(&member.host),
            ..member.clone()
        })
        .collect()
}

/// In place, a chain is what is left of the old one, in its order: each replica then holds a prefix of what those before it
/// hold. Only the replica that the tail has been filling may come in addition, at the end.
pub(super) fn check_in_place(view: &View, chain: &[Member]) -> Result<(), Rejection> {
    let mut last = None;
    for (i, member) in chain.iter().enumerate() {
        match view.position(&member.host) {
            Some(position) if last.is_none_or(|last| position > last) => last = Some(position),
            None if view.is_joining(&member.host) && i + 1 == chain.len() && i > 0 => {}
            _ => {
                return Err(Rejection::Chain(format!(
                    "{} cannot be there unless the chain begins anew",
                    member.host
                )));
            }
        }
    }
    Ok(())
}

pub(super) fn check_chain(
    owner: &HostId,
    chain: &[Member],
    joining: Option<&Member>,
) -> Result<(), Rejection> {
    if chain.len() > CHAIN_MAX {
        return Err(Rejection::Chain(format!(
            "{} replicas, at most {CHAIN_MAX} are possible",
            chain.len()
        )));
    }
    if joining.is_some() && chain.is_empty() {
        return Err(Rejection::Chain(
            "nobody is there to fill the joining replica".into(),
        ));
    }
    let all: Vec<&Member> = chain.iter().chain(joining).collect();
    for (i, member) in all.iter().enumerate() {
        if member.host == *owner {
            return Err(Rejection::Chain(format!(
                "{owner} is the owner; a backup has to be another host"
            )));
        }
        if all[..i].iter().any(|m| m.host == member.host) {
            return Err(Rejection::Chain(format!("{} is in it twice", member.host)));
        }
    }
    Ok(())
}
