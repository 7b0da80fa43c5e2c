//! `bench`: our cycle beside the floor, in turns, in one run, and how long a hand-over takes.
//!
//! Reading order: [`plain`] (the floor of files), [`memcache`] (that of memcached), [`redis`] (that of Redis, and its peer), [`sql`]
//! (that of SQL databases), [`peers`] (theirs), [`ours`] (our cycles), [`rows`] (beside how many sessions), [`handover`].

mod handover;
mod http;
mod memcache;
mod ours;
mod peers;
mod plain;
mod redis;
mod rows;
mod sql;
mod web;

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use conformance_tests::proxy::Proxy;
use indicatif::ProgressBar;
use serde::Serialize;
use session_core::Dsn;
use sessionkit::memcache::MemcacheConfig;
use sessionkit::sql::SqlConfig;

pub(crate) use self::handover::wait_for_handovers;
use self::ours::{HandlerCycle, PeerCycle, SessionCycle};
use self::peers::ForeignPeer;
use self::plain::{Program, Sync};
pub(crate) use self::sql::drop_table;
use self::web::WebCycle;
use crate::args::BenchArgs;
use crate::failure::Failure;
use crate::output::{Align, Cell, Output, Style, Table, bytes, micros, span, thousands};
use crate::store::{Place, Stores, connect, redact};

/// What one contender did in one round.
#[derive(Debug)]
pub(crate) struct Round {
    /// When it began and ended.
    pub(crate) ran: (Instant, Instant),
    /// How long each cycle took, in nanoseconds.
    pub(crate) waits: Vec<u32>,
}

impl Round {
    fn nanos(wait: Duration) -> u32 {
        u32::try_from(wait.as_nanos()).unwrap_or(u32::MAX)
    }

    /// Joins what ran side by side. A thread that got the processor late ran late: from the first beginning to the last end.
    fn join(parts: Vec<Self>) -> Self {
        let now = Instant::now();
        let began = parts.iter().map(|part| part.ran.0).min().unwrap_or(now);
        let ended = parts.iter().map(|part| part.ran.1).max().unwrap_or(now);
        Self { ran: (began, ended), waits: parts.into_iter().flat_map(|part| part.waits).collect() }
    }

    #[expect(clippy::cast_precision_loss, reason = "nobody counts 2^52 cycles in a round")]
    fn cycles_per_s(&self) -> f64 {
        self.waits.len() as f64 / (self.ran.1 - self.ran.0).as_secs_f64().max(1e-9)
    }
}

/// A line of the answer.
#[derive(Debug, Serialize)]
struct Measurement {
    what: &'static str,
    dsn: String,
    tasks: usize,
    payload: u32,
    cycles_per_s: Option<f64>,
    floor_cycles_per_s: Option<f64>,
    ratio: Option<f64>,
    p50_us: Option<f64>,
    p99_us: Option<f64>,
    trips: Option<u32>,
}

pub(crate) async fn bench(args: BenchArgs, out: &Output) -> Result<(), Failure> {
    for dsn in &args.dsns {
        if args.rows.is_some() && !is_sql(dsn)? {
            return Err(Failure::usage("--rows is for SQL databases, where sessions can be put in a table of their own"));
        }
        // All of them, before the first is measured for seconds.
        sessionkit::handler(dsn).await?;
    }
    for (n, dsn) in args.dsns.iter().enumerate() {
        if n > 0 && !out.is_json() {
            out.raw("")?;
        }
        let arena = Arena::new(dsn, &args).await?;
        let mut measured = arena.measure(out).await?;
        if let Some(rows) = args.rows {
            measured.extend(arena.beside_rows(rows, out).await?);
        }
        for measurement in measured.iter().filter(|_| out.is_json()) {
            out.object(measurement)?;
        }
        if !out.is_json() {
            print(dsn, &args, &measured, out)?;
        }
    }
    Ok(())
}

/// The place where all contenders run.
struct Arena<'a> {
    args: &'a BenchArgs,
    name: String,
    /// What was asked for.
    dsn: &'a str,
    place: Place,
}

/// Everything that takes part in the rounds.
enum Contender {
    Plain(Program, PathBuf, Sync),
    Cycle(HandlerCycle),
    Session(SessionCycle),
    Peer(PeerCycle),
    MemcachePlain(memcache::PlainCycle),
    RedisPlain(redis::PlainCycle),
    RedisPeer(redis::PeerCycle),
    SqlPlain(sql::PlainCycle),
    Pgbench(sql::pgbench::Pgbench),
    Foreign(ForeignPeer),
    Web(WebCycle),
}

/// How long a contender runs while its flights are counted.
const COUNTED: Duration = Duration::from_millis(30);
/// How long nothing may pass before that.
const SILENCE: Duration = Duration::from_millis(100);

impl<'a> Arena<'a> {
    async fn new(dsn: &'a str, args: &'a BenchArgs) -> Result<Self, Failure> {
        Ok(Self { args, name: redact(dsn), dsn, place: Place::new(dsn, "bench").await? })
    }

    async fn measure(&self, out: &Output) -> Result<Vec<Measurement>, Failure> {
        let mut measured = Vec::new();
        let bar = out.progress(0, "  {bar:32} {percent:>3} %  {msg}");
        bar.set_message("preparing");
        let stores = self.place.stores();
        // A server is shared by more than the threads of one machine.
        let crowd = if matches!(self.place, Place::Prefix(_)) { 64 } else { 16 };
        for tasks in [1, crowd] {
            let contenders = self.contenders(stores.as_ref(), tasks).await?;
            bar.set_length(2 * u64::from(self.args.rounds + 1) * contenders.len() as u64);
            let medians = self.rounds(&contenders, tasks, &bar).await?;
            self.compare(&contenders, &medians, tasks, &mut measured);
            remove(contenders).await?;
        }
        if let Some(stores) = &stores {
            if let Some(server) = stores.server() {
                bar.set_message("round trips");
                let trips = self.trips(stores, server).await?;
                for line in &mut measured {
                    line.trips = trips.get(line.what).copied();
                }
            }
            if self.args.web {
                stores.sweep("ours").await?;
                bar.finish_and_clear();
                return Ok(measured);
            }
            bar.set_message("hand-over");
            let dsn = stores.dsn("ours")?;
            let handed = handover::between_processes(&dsn, self.args.handovers).await?;
            measured.push(self.waits("handover_processes", 2, handed.waits));
            let handed = handover::between_tasks(&connect(&dsn).await?, self.args.handovers).await?;
            measured.push(self.waits("handover_tasks", 2, handed.waits));
            if let Some(server) = stores.server()
                && is_memcache(self.dsn)?
                && self.is_open()
            {
                bar.set_message("commands of waiters");
                for (what, apart) in [("commands_of_waiters", false), ("commands_of_waiters_apart", true)] {
                    let rate = memcache::commands_of_waiters(&dsn, &server, apart).await?;
                    let waits = self.waits(what, memcache::WAITERS, Vec::new());
                    measured.push(Measurement { cycles_per_s: Some(round(rate, 1)), ..waits });
                }
            }
            stores.sweep("ours").await?;
        }
        bar.finish_and_clear();
        Ok(measured)
    }

    /// Makes ready whole requests: ours, and those of the peers where their program is at hand.
    async fn requests(&self, stores: Option<&Stores>, tasks: usize) -> Result<Vec<(&'static str, Contender)>, Failure> {
        let payload = self.args.payload as usize;
        let at = |name: &str| stores.map_or_else(|| Ok(self.dsn.to_owned()), |stores| stores.dsn(name));
        let ours = WebCycle::prepare(connect(&at("ours")?).await?, tasks, payload).await?;
        let mut contenders = vec![("web", Contender::Web(ours))];
        if let Some(program) = &self.args.peers {
            for name in ["tower_sessions", "axum_session"] {
                let peer = ForeignPeer::prepare(program, &at("plain")?, tasks, payload, Some(name)).await?;
                contenders.extend(peer.map(|peer| (name, Contender::Foreign(peer))));
            }
        }
        Ok(contenders)
    }

    /// Makes ready whatever can be measured in this place, the floor first.
    async fn contenders(&self, stores: Option<&Stores>, tasks: usize) -> Result<Vec<(&'static str, Contender)>, Failure> {
        if self.args.web {
            return self.requests(stores, tasks).await;
        }
        let payload = self.args.payload as usize;
        let ours = stores.map_or_else(|| Ok(self.dsn.to_owned()), |stores| stores.dsn("ours"))?;
        let cycle = HandlerCycle::prepare(sessionkit::handler(&ours).await?, tasks, payload).await?;
        let session = SessionCycle::prepare(connect(&ours).await?, tasks, payload).await?;
        let mut contenders = vec![("cycle", Contender::Cycle(cycle)), ("session", Contender::Session(session))];
        match &self.place {
            Place::Memory => {}
            Place::Directory(directory, _) => {
                let sync = self.sync()?;
                let plain = |name: &'static str, program: Program| {
                    let place = directory.path().join(name);
                    std::fs::create_dir_all(&place)
                        .and_then(|()| program.prepare(&place, tasks, payload))
                        .map_err(Failure::local("make the files of the floor"))?;
                    Ok::<_, Failure>((name, Contender::Plain(program, place, sync)))
                };
                contenders.insert(0, plain("floor", Program::InPlace)?);
                contenders.push(plain("rename", Program::Rename)?);
                let peer = PeerCycle::prepare(&directory.path().join("peer"), tasks, payload).await?;
                contenders.push(("peer", Contender::Peer(peer)));
            }
            Place::Prefix(_) if is_sql(self.dsn)? => {
                if let Some(stores) = stores {
                    self.beside_sql(&stores.dsn("plain")?, tasks, &mut contenders).await?;
                }
            }
            Place::Prefix(_) => {
                // The plain programs speak with one server, in plain TCP.
                let on_one_server = stores.and_then(|stores| Some((stores, stores.server()?)));
                if is_memcache(self.dsn)? {
                    let Some((stores, server)) = on_one_server.filter(|_| self.is_open()) else { return Ok(contenders) };
                    let dsn = stores.dsn("plain")?;
                    for (name, program) in [("floor", memcache::Program::Locked), ("unlocked", memcache::Program::Unlocked)]
                    {
                        let plain = memcache::PlainCycle::prepare(&dsn, &server, program, tasks, payload).await?;
                        let place = if name == "floor" { 0 } else { contenders.len() };
                        contenders.insert(place, (name, Contender::MemcachePlain(plain)));
                    }
                } else if let Some((stores, _)) = on_one_server {
                    let dsn = stores.dsn("plain")?;
                    let floor = redis::PlainCycle::prepare(&dsn, redis::Program::Locked, tasks, payload).await?;
                    contenders.insert(0, ("floor", Contender::RedisPlain(floor)));
                    let unlocked = redis::PlainCycle::prepare(&dsn, redis::Program::Unlocked, tasks, payload).await?;
                    contenders.push(("unlocked", Contender::RedisPlain(unlocked)));
                    let peer = redis::PeerCycle::prepare(&dsn, redis::Layer::Store, tasks, payload).await?;
                    let handler = sessionkit::handler(&ours).await?;
                    let record = HandlerCycle::prepare_with(handler, tasks, peer.encoded(), redis::count_up_encoded).await?;
                    let session = redis::PeerCycle::prepare(&dsn, redis::Layer::Session, tasks, payload).await?;
                    contenders.push(("record", Contender::Cycle(record)));
                    contenders.push(("peer", Contender::RedisPeer(peer)));
                    contenders.push(("peer_session", Contender::RedisPeer(session)));
                }
            }
        }
        Ok(contenders)
    }

    /// Whether the server lets in who says no password, as the plain programs of memcached do: their client cannot.
    fn is_open(&self) -> bool {
        Dsn::parse(self.dsn).is_ok_and(|dsn| dsn.user().is_none())
    }

    /// Measures beside few and beside many sessions, in two tables that are gone afterwards.
    async fn beside_rows(&self, rows: NonZeroU32, out: &Output) -> Result<Vec<Measurement>, Failure> {
        let Some(stores) = self.place.stores() else { return Ok(Vec::new()) };
        let dsns = [stores.apart("few")?, stores.apart("many")?];
        let bar = out.progress(0, "  {spinner}  {msg}  {elapsed}");
        bar.set_message(format!("{} sessions", thousands(rows.get().into())));
        let measured = self.in_tables(&dsns, rows).await;
        bar.finish_and_clear();
        for dsn in &dsns {
            drop_table(dsn).await?;
        }
        measured
    }

    async fn in_tables(&self, dsns: &[String; 2], rows: NonZeroU32) -> Result<Vec<Measurement>, Failure> {
        let ([few, many], payload) = (rows::counts(rows), self.args.payload as usize);
        let few = rows::Table::fill(&dsns[0], few.0, few.1, payload).await?;
        let many = rows::Table::fill(&dsns[1], many.0, many.1, payload).await?;
        let mut measured = Vec::new();
        for tasks in [1, 64] {
            let beside = rows::compare(&few, &many, tasks, self.args.rounds, self.args.round).await?;
            measured.push(Measurement {
                cycles_per_s: Some(round(beside.many, 1)),
                floor_cycles_per_s: Some(round(beside.few, 1)),
                ratio: Some(four_digits(beside.many / beside.few)),
                ..self.waits("many_vs_few", beside.tasks, beside.waits)
            });
        }
        let rows::Collecting { tasks, freed, during, without, batches } = rows::collect(&many).await?;
        if freed < u64::from(rows.get() / 10) {
            return Err(Failure::no("collecting left behind what had expired"));
        }
        let slowest = |round: &Round, share: f64| {
            let mut waits = round.waits.clone();
            waits.sort_unstable();
            quantile(&waits, share).map_or_else(Vec::new, |wait| vec![wait])
        };
        let slow = [
            ("p999_during_gc", slowest(&during, 0.999)),
            ("p999_without_gc", slowest(&without, 0.999)),
            ("longest_during_gc", slowest(&during, 1.0)),
            ("longest_without_gc", slowest(&without, 1.0)),
        ];
        measured.push(Measurement {
            cycles_per_s: Some(round(during.cycles_per_s(), 1)),
            floor_cycles_per_s: Some(round(without.cycles_per_s(), 1)),
            ratio: Some(four_digits(during.cycles_per_s() / without.cycles_per_s())),
            ..self.waits("during_gc_vs_without", tasks, during.waits)
        });
        measured.extend(slow.map(|(what, waits)| self.waits(what, tasks, waits)));
        measured.push(self.waits("gc_batch", 1, batches));
        Ok(measured)
    }

    /// What runs beside ours on a SQL database.
    async fn beside_sql(
        &self,
        dsn: &str,
        tasks: usize,
        contenders: &mut Vec<(&'static str, Contender)>,
    ) -> Result<(), Failure> {
        let payload = self.args.payload as usize;
        let floor = sql::PlainCycle::prepare(dsn, sql::Program::Locked, tasks, payload).await?;
        contenders.insert(0, ("floor", Contender::SqlPlain(floor)));
        let unlocked = sql::PlainCycle::prepare(dsn, sql::Program::Unlocked, tasks, payload).await?;
        contenders.push(("unlocked", Contender::SqlPlain(unlocked)));
        if let Some(program) = sql::pgbench::find().filter(|_| payload <= sql::pgbench::LARGEST) {
            let pgbench = sql::pgbench::Pgbench::prepare(program, dsn, tasks, payload).await?;
            contenders.extend(pgbench.map(|pgbench| ("pgbench", Contender::Pgbench(pgbench))));
        }
        if let Some(program) = &self.args.peers {
            let peer = ForeignPeer::prepare(program, dsn, tasks, payload, None).await?;
            contenders.extend(peer.map(|peer| ("peer", Contender::Foreign(peer))));
        }
        Ok(())
    }

    /// What the plain programs ask of the disk: the same as ours.
    fn sync(&self) -> Result<Sync, Failure> {
        Ok(match Dsn::parse(self.dsn)?.option("durability") {
            Some("none") => Sync::None,
            Some("full") => Sync::Full,
            _ => Sync::Data,
        })
    }

    /// Counts the flights of a cycle of each contender at a proxy, apart from the rounds, which it would slow down.
    async fn trips(&self, stores: &Stores, server: String) -> Result<HashMap<&'static str, u32>, Failure> {
        let proxy = Proxy::start(server).await.map_err(Failure::local("start a proxy"))?;
        let contenders = self.contenders(Some(&stores.through(proxy.address())), 1).await?;
        let mut trips = HashMap::new();
        for (name, contender) in &contenders {
            if matches!(contender, Contender::Pgbench(_)) {
                // It connects anew for each run, which is more flights than its cycles.
                continue;
            }
            let payload = self.args.payload as usize;
            // Whatever only a first cycle needs.
            contender.run(1, payload, COUNTED).await?;
            // What a handler does in the background, such as to make the connection that wakes its waiters, is no part of a cycle.
            proxy.silence(SILENCE, 50 * SILENCE).await;
            proxy.reset_counters();
            let cycles = contender.run(1, payload, COUNTED).await?.waits.len().max(1) as u64;
            let flights = (proxy.round_trips() + cycles / 2) / cycles;
            trips.insert(*name, u32::try_from(flights).unwrap_or(u32::MAX));
        }
        remove(contenders).await?;
        Ok(trips)
    }

    /// Lets each contender run in each round, and returns for each the median of its rates and all of its waits.
    async fn rounds(
        &self,
        contenders: &[(&'static str, Contender)],
        tasks: usize,
        bar: &ProgressBar,
    ) -> Result<Vec<(f64, Vec<u32>)>, Failure> {
        let mut rates = vec![Vec::new(); contenders.len()];
        let mut waits = vec![Vec::new(); contenders.len()];
        for round in 0..=self.args.rounds {
            for n in turns(round as usize, contenders.len()) {
                let (name, contender) = &contenders[n];
                bar.set_message(format!("{name}, {tasks} task{}", if tasks == 1 { "" } else { "s" }));
                let ran = contender.run(tasks, self.args.payload as usize, self.args.round).await?;
                bar.inc(1);
                // The first round warms caches, allocators and the clock of the processor.
                if round > 0 {
                    rates[n].push(ran.cycles_per_s());
                    waits[n].extend(ran.waits);
                }
            }
        }
        Ok(rates.into_iter().map(median).zip(waits).collect())
    }

    fn compare(
        &self,
        contenders: &[(&'static str, Contender)],
        medians: &[(f64, Vec<u32>)],
        tasks: usize,
        measured: &mut Vec<Measurement>,
    ) {
        let rate = |name| contenders.iter().position(|(other, _)| *other == name).map(|n| medians[n].0);
        for ((name, _), (cycles, waits)) in contenders.iter().zip(medians) {
            let floor = rate("floor").filter(|_| *name != "floor");
            measured.push(Measurement {
                cycles_per_s: Some(round(*cycles, 1)),
                floor_cycles_per_s: floor.map(|floor| round(floor, 1)),
                ratio: floor.map(|floor| four_digits(cycles / floor)),
                ..self.waits(name, tasks, waits.clone())
            });
        }
        let mut pairs = vec![
            ("cycle_vs_rename", "cycle", "rename"),
            ("cycle_vs_unlocked", "cycle", "unlocked"),
            ("cycle_vs_pgbench", "cycle", "pgbench"),
            ("record_vs_peer", "record", "peer"),
            ("session_vs_peer_session", "session", "peer_session"),
            ("web_vs_tower_sessions", "web", "tower_sessions"),
            ("web_vs_axum_session", "web", "axum_session"),
        ];
        // The peer of files knows no durability: beside a store that waits for the disk, the factor would compare two promises.
        let waits_for_disk = contenders.iter().any(|(_, contender)| match contender {
            Contender::Plain(_, _, sync) => *sync != Sync::None,
            _ => false,
        });
        if !waits_for_disk {
            pairs.push(("session_vs_peer", "session", "peer"));
        }
        for (what, ours, theirs) in pairs {
            if let (Some(ours), Some(theirs)) = (rate(ours), rate(theirs)) {
                measured.push(Measurement {
                    cycles_per_s: Some(round(ours, 1)),
                    floor_cycles_per_s: Some(round(theirs, 1)),
                    ratio: Some(four_digits(ours / theirs)),
                    ..self.waits(what, tasks, Vec::new())
                });
            }
        }
    }

    fn waits(&self, what: &'static str, tasks: usize, mut waits: Vec<u32>) -> Measurement {
        waits.sort_unstable();
        let at = |share: f64| quantile(&waits, share).map(|nanos| round(f64::from(nanos) / 1000.0, 2));
        Measurement {
            what,
            dsn: self.name.clone(),
            tasks,
            payload: self.args.payload,
            cycles_per_s: None,
            floor_cycles_per_s: None,
            ratio: None,
            p50_us: at(0.5),
            p99_us: at(0.99),
            trips: None,
        }
    }
}

impl Contender {
    async fn run(&self, tasks: usize, payload: usize, length: Duration) -> Result<Round, Failure> {
        match self {
            Self::Cycle(cycle) => cycle.run(length).await,
            Self::Session(cycle) => cycle.run(length).await,
            Self::Peer(cycle) => cycle.run(length).await,
            Self::MemcachePlain(cycle) => cycle.run(length).await,
            Self::RedisPlain(cycle) => cycle.run(length).await,
            Self::RedisPeer(cycle) => cycle.run(length).await,
            Self::SqlPlain(cycle) => cycle.run(length).await,
            Self::Pgbench(pgbench) => pgbench.run(length).await,
            Self::Foreign(peer) => peer.run(length).await,
            Self::Web(cycle) => cycle.run(length).await,
            Self::Plain(program, directory, sync) => {
                let (program, directory, sync) = (*program, directory.clone(), *sync);
                let run = move || program.run(&directory, tasks, payload, sync, length);
                let ran = tokio::task::spawn_blocking(run).await.expect("a plain program does not panic");
                ran.map_err(Failure::local("run a plain program in the store's directory"))
            }
        }
    }
}

fn is_sql(dsn: &str) -> session_core::Result<bool> {
    Ok(SqlConfig::SCHEMES.contains(&Dsn::parse(dsn)?.scheme()))
}

fn is_memcache(dsn: &str) -> session_core::Result<bool> {
    Ok(MemcacheConfig::SCHEMES.contains(&Dsn::parse(dsn)?.scheme()))
}

/// Removes what the contenders have stored where nobody removes it as a whole.
async fn remove(contenders: Vec<(&'static str, Contender)>) -> Result<(), Failure> {
    for (_, contender) in contenders {
        match contender {
            Contender::MemcachePlain(cycle) => cycle.remove().await?,
            Contender::RedisPlain(cycle) => cycle.remove().await?,
            Contender::RedisPeer(cycle) => cycle.remove().await?,
            Contender::SqlPlain(cycle) => cycle.remove().await?,
            Contender::Pgbench(pgbench) => pgbench.remove().await?,
            Contender::Foreign(peer) => peer.end().await?,
            Contender::Plain(..) | Contender::Cycle(_) | Contender::Session(_) | Contender::Peer(_) | Contender::Web(_) => {}
        }
    }
    Ok(())
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    let middle = rates.len() / 2;
    match rates.len() {
        0 => 0.0,
        n if n.is_multiple_of(2) => f64::midpoint(rates[middle - 1], rates[middle]),
        _ => rates[middle],
    }
}

fn quantile(sorted: &[u32], share: f64) -> Option<u32> {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "an index")]
    let at = (sorted.len() as f64 * share) as usize;
    sorted.get(at.min(sorted.len().saturating_sub(1))).copied()
}

/// Enough to tell ratios apart, and not more than the noise allows.
fn four_digits(ratio: f64) -> f64 {
    format!("{ratio:.3e}").parse().expect("a printed number can be read")
}

/// The order of the contenders in a round. What the one before has left awake, and where, is up to a third of a lone cycle, so each
/// comes as often behind each other one (E. J. Williams, "Experimental designs balanced for the estimation of residual effects of
/// treatments", 1949): each row of the square moves the one before on by one, and every other row goes backwards.
fn turns(round: usize, count: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |n| {
        let n = if round.is_multiple_of(2) { n } else { count - 1 - n };
        let zigzag = if n.is_multiple_of(2) { count - n / 2 } else { n.div_ceil(2) };
        (zigzag + round / 2) % count
    })
}

fn round(number: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (number * scale).round() / scale
}

fn print(dsn: &str, args: &BenchArgs, measured: &[Measurement], out: &Output) -> Result<(), Failure> {
    let rounds = match args.rounds {
        1 => "1 round".to_owned(),
        rounds => format!("medians of {rounds} rounds"),
    };
    let how = format!("{} a session, {rounds} of {}", bytes(args.payload.into()), span(args.round));
    out.raw(&format!("{}  {}", out.paint(Style::Bold, crate::output::escape(&redact(dsn))), out.paint(Style::Dim, how)))?;
    let mut columns = vec![
        ("what", Align::Left),
        ("tasks", Align::Right),
        ("cycles/s", Align::Right),
        ("beside", Align::Right),
        ("ratio", Align::Right),
        ("p50", Align::Right),
        ("p99", Align::Right),
    ];
    let counted = measured.iter().any(|line| line.trips.is_some());
    if counted {
        columns.push(("trips", Align::Right));
    }
    let mut table = Table::new(&columns);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate is positive and small")]
    let rate = |rate: Option<f64>| rate.map_or_else(String::new, |rate| thousands(rate.round() as u64));
    let mut tasks = None;
    for line in measured {
        // A blank line between what ran apart.
        if tasks.replace(line.tasks).is_some_and(|before| before != line.tasks) {
            table.row(Vec::new());
        }
        let time = |us: Option<f64>| Cell::new(us.map_or_else(String::new, micros));
        let ratio = line
            .ratio
            .map_or_else(String::new, |ratio| if ratio < 0.1 { format!("{ratio:.4}") } else { format!("{ratio:.2}") });
        let mut cells = vec![
            Cell::new(line.what),
            Cell::styled(line.tasks.to_string(), Style::Dim),
            Cell::new(rate(line.cycles_per_s)),
            Cell::styled(rate(line.floor_cycles_per_s), Style::Dim),
            Cell::styled(ratio, Style::Bold),
            time(line.p50_us),
            time(line.p99_us),
        ];
        if counted {
            cells.push(Cell::new(line.trips.map_or_else(String::new, |trips| trips.to_string())));
        }
        table.row(cells);
    }
    table.print(out)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_contender_comes_as_often_behind_each_other_one() {
        for count in 1..8 {
            let mut behind = vec![vec![0; count]; count];
            for round in 0..2 * count {
                let order: Vec<_> = turns(round, count).collect();
                let all: BTreeSet<_> = order.iter().copied().collect();
                assert_eq!(all, (0..count).collect(), "each has one turn in each round");
                order.windows(2).for_each(|pair| behind[pair[0]][pair[1]] += 1);
            }
            for (before, after) in (0..count * count).map(|n| (n / count, n % count)) {
                assert_eq!(behind[before][after], if before == after { 0 } else { 2 }, "{after} behind {before} of {count}");
            }
        }
    }

    #[test]
    fn what_ran_side_by_side_but_not_at_the_same_time_took_as_long_as_all_of_it() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let late = Round { ran: (at(50), at(100)), waits: vec![1; 30] };
        let joined = Round::join(vec![Round { ran: (at(0), at(50)), waits: vec![1; 20] }, late]);
        assert!((joined.cycles_per_s() - 500.0).abs() < 1e-6);
    }

    #[test]
    fn medians_and_quantiles_are_of_the_middle() {
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median(vec![4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
        let waits: Vec<u32> = (0..1000).collect();
        assert_eq!((quantile(&waits, 0.5), quantile(&waits, 0.99), quantile(&[], 0.5)), (Some(500), Some(990), None));
    }
}
