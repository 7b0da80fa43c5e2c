//! `hammer`: the proof that nothing is lost, for people and for programs.
//!
//! The work and the books are the business of `conformance_tests::hammer`; here is what is asked for and what is shown.

use std::time::Duration;

use conformance_tests::hammer::{self, Hammer, HammerLength, Progress, Report};
use session_core::Dsn;

use crate::args::{HammerAccess, HammerArgs, Part};
use crate::failure::Failure;
use crate::output::{Align, Cell, Output, Style, Table, escape, span, thousands};
use crate::store::{connect, redact};
use crate::worker;

pub(crate) async fn hammer(args: HammerArgs, out: &Output) -> Result<(), Failure> {
    let sessions = connect(&args.dsn).await?;
    if Dsn::parse(&args.dsn)?.scheme() == "memory" {
        return Err(Failure::usage("hammer needs a store that processes can share, not memory://"));
    }
    let hammer = plan(&args)?;
    if !out.is_json() {
        out.raw(&format!(
            "{}  {}",
            out.paint(Style::Bold, escape(&redact(&args.dsn))),
            out.paint(Style::Dim, describe(&hammer))
        ))?;
    }
    // Found before the first is started, so that a failure has a name.
    worker::command(Part::Hammer)?;
    let start = || worker::command(Part::Hammer).expect("this program has just been found");
    let bar = out.progress(1000, "  {bar:32} {percent:>3} %  {msg}");
    let show = |progress: &Progress| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of 1000")]
        bar.set_position((progress.done * 1000.0) as u64);
        bar.set_message(format!("{} acknowledged, {} killed", thousands(progress.acked), thousands(progress.killed)));
    };
    let report = hammer.run(&args.dsn, sessions.handler().clone(), start, show).await?;
    bar.finish_and_clear();
    if out.is_json() {
        out.object(&report)?;
    } else {
        print(&report, out)?;
    }
    // Said where a program that reads the numbers would not see it.
    for fault in report.faults.iter().filter(|_| out.is_json()) {
        eprintln!("sessionctl: {}", escape(fault));
    }
    if report.kept() { Ok(()) } else { Err(Failure::No(None)) }
}

/// What [`Part::Hammer`] does.
pub(crate) async fn take_part() -> Result<(), Failure> {
    Ok(hammer::worker(async |dsn: &str| Ok(sessionkit::connect(dsn).await?.handler().clone())).await?)
}

fn plan(args: &HammerArgs) -> Result<Hammer, Failure> {
    let mut hammer = Hammer::new()?;
    hammer.processes = args.processes;
    hammer.tasks = args.tasks;
    hammer.sessions = args.sessions;
    hammer.length = args.ops.map_or(HammerLength::Time(Duration::from_secs(args.seconds)), HammerLength::Ops);
    hammer.access = match args.access {
        HammerAccess::Exclusive => hammer::HammerAccess::Exclusive,
        HammerAccess::Optimistic => hammer::HammerAccess::Optimistic,
        HammerAccess::Merge => hammer::HammerAccess::Merge,
        HammerAccess::None => hammer::HammerAccess::None,
    };
    (hammer.stall, hammer.kill) = (args.stall, args.kill);
    if let Some(lease) = args.lease.or(Dsn::parse(&args.dsn)?.duration("lease")?) {
        hammer.lease = lease;
    }
    (hammer.hold, hammer.payload) = (args.hold, args.payload as usize);
    hammer.seed = args.seed.unwrap_or(hammer.seed);
    Ok(hammer)
}

fn describe(hammer: &Hammer) -> String {
    let many = |number: u32, one: &str, more: &str| {
        format!("{} {}", thousands(number.into()), if number == 1 { one } else { more })
    };
    let access = match hammer.access {
        hammer::HammerAccess::Exclusive => "exclusive",
        hammer::HammerAccess::Optimistic => "optimistic",
        hammer::HammerAccess::Merge => "merge",
        _ => "no lock, no fence",
    };
    let length = match hammer.length {
        HammerLength::Ops(ops) => format!("{} changes", thousands(ops)),
        HammerLength::Time(time) => span(time),
        _ => String::new(),
    };
    let processes = many(hammer.processes, "process", "processes");
    let tasks = many(hammer.tasks, "task", "tasks");
    let sessions = many(hammer.sessions, "session", "sessions");
    format!("{processes} × {tasks}, {sessions}, {access}, {length}")
}

fn print(report: &Report, out: &Output) -> Result<(), Failure> {
    let mut table = Table::new(&[("", Align::Left), ("", Align::Right), ("", Align::Left)]);
    let mut row = |name: &str, value: String, style: Style, note: String| {
        table.row(vec![Cell::styled(name, Style::Dim), Cell::styled(value, style), Cell::styled(note, Style::Dim)]);
    };
    let mut count = |name: &str, number: u64, note: &str| row(name, thousands(number), Style::Plain, note.to_owned());
    count("acknowledged", report.acked, "");
    count("final", report.final_count, "in the sessions at the end");
    let lost = if report.lost == 0 { Style::Good } else { Style::Bad };
    row("lost", thousands(report.lost), lost, "acknowledged and not there".to_owned());
    let mut count = |name: &str, number: u64, note: &str| row(name, thousands(number), Style::Plain, note.to_owned());
    count("fenced", report.fenced, "refused, because somebody had taken over");
    count("gone", report.gone, "opened or written, and not there");
    count("unknown", report.unknown, "applied or not, nobody was told");
    let stopped = format!("processes; {} stopped past their lease", thousands(report.stalled));
    count("killed", report.killed, &stopped);
    let wait = |us: u64| span(Duration::from_micros(us));
    row("cycles/s", format!("{:.0}", report.cycles_per_s), Style::Plain, String::new());
    row("wait p50", wait(report.wait_p50_us), Style::Plain, String::new());
    row("wait p99", wait(report.wait_p99_us), Style::Plain, String::new());
    row("wait max", wait(report.wait_max_us), Style::Plain, String::new());
    let shares = format!("{:.3} to {:.3}", report.share_min, report.share_max);
    row("shares", shares, Style::Plain, "of all openings, by process".to_owned());
    row("seed", report.seed.to_string(), Style::Plain, String::new());
    table.print(out)?;
    for fault in &report.faults {
        out.raw(&format!("  {}", out.paint(Style::Bad, escape(fault))))?;
    }
    let (style, verdict) = match (report.kept(), report.lost) {
        (true, _) => (Style::Good, "nothing was lost".to_owned()),
        (false, 0) => (Style::Bad, "the books contradict each other".to_owned()),
        (false, 1) => (Style::Bad, "1 update was lost".to_owned()),
        (false, lost) => (Style::Bad, format!("{} updates were lost", thousands(lost))),
    };
    out.raw(&format!("\n  {}", out.paint(style, verdict)))?;
    Ok(())
}
