//! `understudy bench`: every figure beside its own baseline, measured in one run.

pub mod chain;
pub mod failover;
pub mod latency;
pub mod pause;

use serde::Serialize;

use crate::rank;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// p50, p99 and largest of one phase.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Phase {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Phase {
    /// Nearest-rank percentiles.
    #[must_use]
    pub fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let at = |percent| rank::nearest(&samples, percent).unwrap_or_default();
        Self {
            p50: at(50),
            p99: at(99),
            max: at(100),
        }
    }
}

/// A line for each.
fn phases(phases: &[(&str, Phase)]) {
    for (name, phase) in phases {
        println!(
            "{name:<16} p50 {:>7.1}  p99 {:>7.1}  max {:>7.1} ms",
            phase.p50, phase.p99, phase.max
        );
    }
}

fn print(json: bool, report: &impl Serialize, text: impl FnOnce()) -> Outcome<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(report)?);
    } else {
        text();
    }
    Ok(())
}
