//! The hammer: worker processes write to shared sessions while some of them are stopped and some killed, and at the end every
//! write that was acknowledged must be there.
//!
//! It goes through [`Sessions`], as an application does, and knows nothing of the store below. The proof needs three books:
//! each session holds the numbers of the writes in it (`hammer/ledger.rs`), each process notes on a file, which survives its
//! death, what it began and what was acknowledged (`hammer/journal.rs`), and the parent compares the two.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use session_core::{Error, ErrorKind, Result, SessionHandler, SessionId, Sessions, SessionsBuilder, WriteId};

use crate::children::Child;

mod journal;
mod ledger;
mod worker;

use journal::{Journal, Stats, Waits};
use ledger::{COUNTER, PAD, Runs, Tally, writer_key};
pub use worker::worker;

/// How a worker gets at a session.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HammerAccess {
    /// Under the lock, as [`Sessions::open`] does.
    Exclusive,
    /// Without the lock; a write that lost a race is refused and done again.
    Optimistic,
    /// Without the lock; each writer changes keys of his own, and the shared counter by a function.
    Merge,
    /// The control group: reads, thinks, and then overwrites whatever is there with what it had read. It loses updates, and
    /// shows what the lock is for.
    None,
}

/// How long a run lasts.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HammerLength {
    /// So long, from the moment when all workers are ready.
    Time(Duration),
    /// Until so many writes were acknowledged, in equal shares for each task.
    Ops(u64),
}

/// What a run is to do. The defaults are those of `sessionctl hammer`.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hammer {
    /// Worker processes, 1 to 256.
    pub processes: u32,
    /// Tasks in each process, 1 to 1,024.
    pub tasks: u32,
    /// Sessions that they share, 1 to 10,000.
    pub sessions: u32,
    /// How long.
    pub length: HammerLength,
    /// How the sessions are opened.
    pub access: HammerAccess,
    /// In how many of a hundred cycles a process is stopped, all its tasks with it, for one and a half leases: half of the times
    /// in the middle of a hold, half of them anywhere.
    pub stall: f64,
    /// In how many of a hundred cycles a process is killed, in the same two ways, and replaced.
    pub kill: f64,
    /// How long a lock lasts unless it is renewed.
    pub lease: Duration,
    /// How long a task works between reading and writing.
    pub hold: Duration,
    /// Bytes that each session carries besides its books.
    pub payload: usize,
    /// What all randomness follows from, but for the scheduling of the processes.
    pub seed: u64,
}

impl Hammer {
    /// Begins with the defaults: 4 processes of 8 tasks on one session for 5 s, exclusively, no faults.
    ///
    /// # Errors
    /// [`Unavailable`](ErrorKind::Unavailable) if the operating system has no randomness to give.
    pub fn new() -> Result<Self> {
        let random = WriteId::random()?.to_bytes();
        Ok(Self {
            processes: 4,
            tasks: 8,
            sessions: 1,
            length: HammerLength::Time(Duration::from_secs(5)),
            access: HammerAccess::Exclusive,
            stall: 0.0,
            kill: 0.0,
            lease: Duration::from_secs(2),
            hold: Duration::ZERO,
            payload: 0,
            // Small enough to be typed, and exact in every JSON reader.
            seed: u64::from(u32::from_le_bytes([random[0], random[1], random[2], random[3]])),
        })
    }

    fn check(&self) -> Result<()> {
        let refuse = |ok: bool, message: &'static str| {
            if ok { Ok(()) } else { Err(Error::new(ErrorKind::Config, "hammer", message)) }
        };
        refuse((1..=256).contains(&self.processes), "processes must be 1 to 256")?;
        refuse((1..=1024).contains(&self.tasks), "tasks must be 1 to 1,024")?;
        refuse((1..=10_000).contains(&self.sessions), "sessions must be 1 to 10,000")?;
        let percent = |share: f64| (0.0..=100.0).contains(&share);
        refuse(percent(self.stall) && percent(self.kill), "stall and kill are percentages, 0 to 100")?;
        refuse(self.lease >= Duration::from_millis(10), "lease must be at least 10ms")?;
        refuse(self.payload <= 64 << 20, "payload must be at most 64 MiB")?;
        let length = match self.length {
            HammerLength::Time(time) => time > Duration::ZERO && time <= Duration::from_secs(7 * 24 * 3600),
            HammerLength::Ops(ops) => ops > 0,
        };
        refuse(length, "the run must have a length, a week at most")
    }

    /// The sessions as parent and workers see them.
    fn sessions(&self, handler: Arc<dyn SessionHandler>) -> SessionsBuilder {
        Sessions::builder(handler)
            .ttl(Duration::from_secs(10 * 24 * 3600))
            .absolute_ttl(None)
            .lease(self.lease)
            .max_hold(self.hold * 2 + self.lease * 100 + Duration::from_secs(600))
            .wait((self.lease * 3 + Duration::from_secs(30)).min(Duration::from_secs(600)))
            .queue(self.tasks as usize + 1)
            .max_bytes(self.payload + (64 << 20))
    }

    /// Runs it on the store that `dsn` names in the workers and `handler` is in this process, and reports.
    ///
    /// `command` says how to start a process that calls [`worker`]; the rest it learns from this one. `progress` is called some
    /// ten times a second. The sessions are destroyed at the end. No worker outlives the future, even if it is dropped.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) if a number is out of range, or if the workers do not find the sessions that this process
    /// has made; [`Unavailable`](ErrorKind::Unavailable) if the store never answered; [`Unexpected`](ErrorKind::Unexpected) if a
    /// worker ends by itself. Lost updates are no error, but what the report is there to tell.
    ///
    /// # Panics
    /// If it is not called from within a tokio runtime with time.
    pub async fn run(
        &self,
        dsn: &str,
        handler: Arc<dyn SessionHandler>,
        command: impl Fn() -> Command,
        progress: impl FnMut(&Progress),
    ) -> Result<Report> {
        self.check()?;
        let sessions = self.sessions(handler).build()?;
        let ids = self.create(&sessions).await?;
        let outcome = self.run_on(dsn, &sessions, &ids, command, progress).await;
        for id in &ids {
            // What cannot be removed expires; the report matters more.
            let _ = sessions.destroy(id).await;
        }
        sessions.shutdown().await;
        outcome
    }

    async fn create(&self, sessions: &Sessions) -> Result<Vec<SessionId>> {
        let mut ids = Vec::new();
        for _ in 0..self.sessions {
            let mut session = sessions.create()?;
            session.insert(COUNTER, &0u64)?;
            session.insert(PAD, &"x".repeat(self.payload))?;
            ids.push(session.close().await?.expect("a session with values is stored"));
        }
        Ok(ids)
    }

    async fn run_on(
        &self,
        dsn: &str,
        sessions: &Sessions,
        ids: &[SessionId],
        command: impl Fn() -> Command,
        progress: impl FnMut(&Progress),
    ) -> Result<Report> {
        let directory = Directory::new()?;
        let mut crew = Crew::new(self, dsn, ids, &directory, &command)?;
        let elapsed = crew.work(progress).await?;
        self.report(crew, sessions, ids, elapsed).await
    }

    async fn report(&self, crew: Crew<'_>, sessions: &Sessions, ids: &[SessionId], elapsed: Duration) -> Result<Report> {
        let mut report = Report { seed: self.seed, ..Report::default() };
        let mut stats = Stats::default();
        let mut waits = Waits::default();
        let mut shares = Vec::new();
        for seat in &crew.seats {
            let of_seat = seat.journal.stats()?;
            shares.push(of_seat.acquired);
            stats.add(&of_seat);
            waits.add(&seat.journal.waits()?);
        }
        for (at, id) in ids.iter().enumerate() {
            let patience = Patience::new();
            let books = loop {
                match final_books(sessions, id, self).await {
                    Err(error) => match patience.after(error).await {
                        Ok(()) => {}
                        Err(error) => break Err(error),
                    },
                    books => break books,
                }
            };
            let (counter, lists) = match books {
                Ok(Some(books)) => books,
                Ok(None) => {
                    report.faults.push("a session is gone at the end, although nobody destroyed it".into());
                    Books::default()
                }
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    report.faults.push("a session cannot be read at the end".into());
                    Books::default()
                }
                Err(error) => return Err(error),
            };
            let mut listed = 0;
            for (slot, seat) in crew.seats.iter().enumerate() {
                for task in 0..self.tasks {
                    let cell = seat.journal.cell(task, u32::try_from(at).expect("at most 10,000 sessions"))?;
                    let runs = lists.get(slot * self.tasks as usize + task as usize).cloned().unwrap_or_default();
                    let doubtful = seat.journal.doubtful(task, u32::try_from(at).expect("at most 10,000 sessions"))?;
                    let tally = Tally::of(&runs, cell.begun, &doubtful);
                    report.acked += tally.acked;
                    report.lost += tally.lost;
                    report.unknown += tally.doubtful;
                    listed += tally.there;
                    if tally.strange > 0 {
                        report.faults.push(format!("{} writes are there that were refused or never made", tally.strange));
                    }
                }
            }
            if counter != listed {
                report.faults.push(format!("a counter says {counter}, the lists beside it hold {listed} writes"));
            }
            report.final_count += listed;
        }
        if report.acked == 0 && stats.errors > 0 {
            let text = crew.first_error.unwrap_or_default();
            return Err(Error::new(ErrorKind::Unavailable, "hammer", "no write was acknowledged").with_source(text));
        }
        if stats.corrupt > 0 {
            report.faults.push(format!("{} times a session could not be read", stats.corrupt));
        }
        report.fenced = stats.fenced;
        report.gone = stats.gone;
        report.refused = stats.refused;
        report.errors = stats.errors;
        report.conflicts = stats.conflicts;
        report.killed = crew.killed;
        report.stalled = crew.stalled;
        report.cycles_per_s = (report.acked as f64 / elapsed.as_secs_f64() * 10.0).round() / 10.0;
        report.wait_max_us = stats.longest_wait_us;
        // A bucket may end behind the longest wait in it.
        let quantile = |share| waits.quantile(share).min(stats.longest_wait_us);
        (report.wait_p50_us, report.wait_p99_us) = (quantile(0.5), quantile(0.99));
        let all = shares.iter().sum::<u64>().max(1) as f64;
        let share = |of: Option<&u64>| (*of.unwrap_or(&0) as f64 / all * 10_000.0).round() / 10_000.0;
        (report.share_min, report.share_max) = (share(shares.iter().min()), share(shares.iter().max()));
        Ok(report)
    }
}

/// Rides out a store that is away for a while: a server that is started anew, or replaced by another.
struct Patience {
    ends: Instant,
}

impl Patience {
    /// How long a store may be away.
    const LENGTH: Duration = Duration::from_secs(30);
    /// How long to wait before it is asked again.
    const PAUSE: Duration = Duration::from_millis(50);

    fn new() -> Self {
        Self { ends: Instant::now() + Self::LENGTH }
    }

    /// Waits for a moment if it makes sense to ask again after `error`, which otherwise comes back.
    async fn after(&self, error: Error) -> Result<()> {
        match error.kind() {
            ErrorKind::Unavailable | ErrorKind::Unknown if Instant::now() < self.ends => {
                tokio::time::sleep(Self::PAUSE).await;
                Ok(())
            }
            _ => Err(error),
        }
    }
}

/// What a session holds at the end: the counter, and the lists of all writers in the order of their seats.
type Books = (u64, Vec<Runs>);

/// Reads a session when nothing is under way any more: under the lock, which outwaits the leases of the dead and fences what
/// they may have sent.
async fn final_books(sessions: &Sessions, id: &SessionId, hammer: &Hammer) -> Result<Option<Books>> {
    let writers = || (0..hammer.processes).flat_map(|slot| (0..hammer.tasks).map(move |task| writer_key(slot, task)));
    let opened = match sessions.open(id).await {
        // Where there is no lock there is no better moment than this one.
        Err(error) if error.kind() == ErrorKind::Unsupported => None,
        opened => Some(opened?),
    };
    if let Some(session) = opened {
        if session.is_new() {
            session.abort().await?;
            return Ok(None);
        }
        let lists = writers().map(|key| Ok(session.get(&key)?.unwrap_or_default())).collect::<Result<_>>()?;
        let books = (session.get(COUNTER)?.unwrap_or_default(), lists);
        session.abort().await?;
        return Ok(Some(books));
    }
    let view = sessions.view(id).await?;
    if !view.exists() {
        return Ok(None);
    }
    let lists = writers().map(|key| Ok(view.get(&key)?.unwrap_or_default())).collect::<Result<_>>()?;
    Ok(Some((view.get(COUNTER)?.unwrap_or_default(), lists)))
}

/// How far a run is.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct Progress {
    /// Since the workers began.
    pub elapsed: Duration,
    /// The share of the run that is done, 0 to 1.
    pub done: f64,
    /// Acknowledged writes so far.
    pub acked: u64,
    /// Processes killed so far.
    pub killed: u64,
    /// Processes stopped so far.
    pub stalled: u64,
}

/// What came of a run. As JSON it has the keys that `sessionctl hammer --json` promises, and the seed.
#[non_exhaustive]
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// Writes that the store acknowledged.
    pub acked: u64,
    /// Writes that are in the sessions at the end: at least `acked`, and at most `acked` and `unknown` together.
    #[serde(rename = "final")]
    pub final_count: u64,
    /// Acknowledged writes that are not there at the end.
    pub lost: u64,
    /// Writes refused because somebody had taken over.
    pub fenced: u64,
    /// Opens and writes that found the session absent.
    pub gone: u64,
    /// Writes of which nobody was told whether they were applied: no answer came, or the writer was killed first.
    pub unknown: u64,
    /// Processes killed.
    pub killed: u64,
    /// Acknowledged writes per second.
    pub cycles_per_s: f64,
    /// From asking for the session to having it: the median, in microseconds, to three per cent.
    pub wait_p50_us: u64,
    /// Exceeded by one in a hundred.
    pub wait_p99_us: u64,
    /// The longest.
    pub wait_max_us: u64,
    /// The part of all openings that the process with the fewest got.
    pub share_min: f64,
    /// The part of all openings that the process with the most got.
    pub share_max: f64,
    /// Repeats the randomness of this run.
    pub seed: u64,
    /// Processes stopped past their lease.
    #[serde(skip)]
    pub stalled: u64,
    /// Opens that waited in vain.
    #[serde(skip)]
    pub refused: u64,
    /// Optimistic and merged writes that lost a race and were done again.
    #[serde(skip)]
    pub conflicts: u64,
    /// Calls that the store did not answer.
    #[serde(skip)]
    pub errors: u64,
    /// What is wrong besides lost writes: books that contradict each other.
    #[serde(skip)]
    pub faults: Vec<String>,
}

impl Report {
    /// Whether the promise was kept: nothing lost, nothing there that was refused, and books that agree.
    #[must_use]
    pub fn kept(&self) -> bool {
        self.lost == 0 && self.faults.is_empty() && (self.acked..=self.acked + self.unknown).contains(&self.final_count)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |us: u64| us as f64 / 1000.0;
        writeln!(f, "acknowledged  {:>12}", self.acked)?;
        writeln!(f, "final         {:>12}", self.final_count)?;
        writeln!(f, "lost          {:>12}", self.lost)?;
        writeln!(f, "fenced        {:>12}   refused, as they must be", self.fenced)?;
        writeln!(f, "gone          {:>12}", self.gone)?;
        writeln!(f, "unknown       {:>12}   applied or not, nobody was told", self.unknown)?;
        writeln!(f, "killed        {:>12}   processes; {} stopped past their lease", self.killed, self.stalled)?;
        writeln!(f, "cycles/s      {:>12.1}", self.cycles_per_s)?;
        let (p50, p99, max) = (ms(self.wait_p50_us), ms(self.wait_p99_us), ms(self.wait_max_us));
        writeln!(f, "wait          {p50:>12.3} ms p50, {p99:.3} ms p99, {max:.3} ms max")?;
        let fairness = if self.share_max > 0.0 { self.share_min / self.share_max } else { 0.0 };
        writeln!(f, "fairness      {fairness:>12.2}   shares {:.3} to {:.3}", self.share_min, self.share_max)?;
        for fault in &self.faults {
            writeln!(f, "wrong: {fault}")?;
        }
        write!(f, "seed          {:>12}", self.seed)
    }
}

/// What a worker is told before it begins.
#[derive(Serialize, Deserialize)]
struct Assignment {
    hammer: Hammer,
    dsn: String,
    ids: Vec<String>,
    journal: PathBuf,
    slot: u32,
    incarnation: u64,
}

/// What a worker says, one word a line; after `FAILED` come a kind and a text.
const READY: &str = "ready";
const DONE: &str = "done";
const FAILED: &str = "failed";
/// What it is told.
const GO: &str = "go";
const STOP: &str = "stop";

/// How long a worker may take to start, or to end once it is told to, beyond what it waits for.
const GRACE: Duration = Duration::from_secs(60);

/// All seats, and who sits on them.
struct Crew<'a> {
    hammer: &'a Hammer,
    dsn: &'a str,
    ids: Vec<String>,
    command: &'a dyn Fn() -> Command,
    seats: Vec<Seat>,
    killed: u64,
    stalled: u64,
    first_error: Option<String>,
}

/// The place of one process; who is killed is replaced.
struct Seat {
    journal: Journal,
    slot: u32,
    incarnation: u64,
    child: Option<Child>,
    ready: bool,
    done: bool,
    stopped_since: Option<Instant>,
}

impl<'a> Crew<'a> {
    fn new(
        hammer: &'a Hammer,
        dsn: &'a str,
        ids: &[SessionId],
        directory: &Directory,
        command: &'a dyn Fn() -> Command,
    ) -> Result<Self> {
        let mut seats = Vec::new();
        for slot in 0..hammer.processes {
            let journal = Journal::create(directory.0.join(slot.to_string()), hammer.tasks, hammer.sessions)?;
            let seat = Seat { journal, slot, incarnation: 0, child: None, ready: false, done: false, stopped_since: None };
            seats.push(seat);
        }
        let ids = ids.iter().map(|id| id.as_str().to_owned()).collect();
        Ok(Self { hammer, dsn, ids, command, seats, killed: 0, stalled: 0, first_error: None })
    }

    /// Lets the workers work, and returns how long they did.
    async fn work(&mut self, mut progress: impl FnMut(&Progress)) -> Result<Duration> {
        for at in 0..self.seats.len() {
            self.hire(at)?;
        }
        let patience = Instant::now() + GRACE;
        while !self.seats.iter().all(|seat| seat.ready) {
            self.listen()?;
            for at in 0..self.seats.len() {
                if let Some(status) = self.has_ended(at)? {
                    self.last_words(at).await?;
                    return Err(self.broken(status));
                }
            }
            if Instant::now() > patience {
                return Err(Error::new(ErrorKind::Unexpected, "hammer", "the workers did not get ready within a minute"));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let started = Instant::now();
        self.tell_all(GO);
        let mut told = Instant::now();
        while !self.seats.iter().all(|seat| seat.done) {
            self.listen()?;
            self.end_stalls();
            self.replace_the_dead().await?;
            let over = matches!(self.hammer.length, HammerLength::Time(time) if started.elapsed() >= time);
            if over {
                break;
            }
            if told.elapsed() > Duration::from_millis(100) {
                told = Instant::now();
                progress(&self.progress(started.elapsed())?);
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let elapsed = started.elapsed();
        progress(&self.progress(elapsed)?);
        self.dismiss().await?;
        Ok(elapsed)
    }

    fn hire(&mut self, at: usize) -> Result<()> {
        let seat = &mut self.seats[at];
        let assignment = Assignment {
            hammer: self.hammer.clone(),
            dsn: self.dsn.to_owned(),
            ids: self.ids.clone(),
            journal: seat.journal.path().to_owned(),
            slot: seat.slot,
            incarnation: seat.incarnation,
        };
        let mut child = Child::start(&mut (self.command)()).map_err(|e| no_worker(&e))?;
        let line = serde_json::to_string(&assignment).expect("an assignment is plain data");
        child.send(&line).map_err(|e| no_worker(&e))?;
        (seat.child, seat.ready, seat.stopped_since) = (Some(child), false, None);
        Ok(())
    }

    /// Hears what the workers say.
    fn listen(&mut self) -> Result<()> {
        for seat in &mut self.seats {
            let Some(child) = &mut seat.child else { continue };
            while let Some(line) = child.line_now() {
                match hear(&line)? {
                    Word::Ready => {
                        seat.ready = true;
                        // The first ones wait for each other; who replaces a dead one begins at once.
                        if seat.incarnation > 0 {
                            let _ = child.send(GO);
                        }
                    }
                    Word::Done => seat.done = true,
                    Word::Error(text) => self.first_error = self.first_error.take().or(Some(text)),
                }
            }
        }
        Ok(())
    }

    /// Hears the last words of a process that has ended.
    async fn last_words(&mut self, at: usize) -> Result<()> {
        let seat = &mut self.seats[at];
        let Some(child) = &mut seat.child else { return Ok(()) };
        while let Ok(Some(line)) = child.line(GRACE).await {
            match hear(&line)? {
                Word::Ready => {}
                Word::Done => seat.done = true,
                Word::Error(text) => self.first_error = self.first_error.take().or(Some(text)),
            }
        }
        Ok(())
    }

    fn tell_all(&mut self, word: &str) {
        for child in self.seats.iter_mut().filter_map(|seat| seat.child.as_mut()) {
            // Who has died meanwhile is noticed elsewhere.
            let _ = child.send(word);
        }
    }

    /// Lets those go on who have stood still for longer than their lease.
    fn end_stalls(&mut self) {
        for seat in &mut self.seats {
            let Some(child) = &seat.child else { continue };
            match seat.stopped_since {
                None if child.is_stopped() => {
                    seat.stopped_since = Some(Instant::now());
                    self.stalled += 1;
                }
                Some(since) if since.elapsed() >= self.hammer.lease.mul_f64(1.5) => {
                    // Who was killed while stopped cannot go on, and is replaced.
                    let _ = child.go_on();
                    seat.stopped_since = None;
                }
                _ => {}
            }
        }
    }

    async fn replace_the_dead(&mut self) -> Result<()> {
        for at in 0..self.seats.len() {
            if self.bury(at).await? {
                self.hire(at)?;
            }
        }
        Ok(())
    }

    /// Closes the books of a process that has ended; says whether it was killed in the middle of its work.
    async fn bury(&mut self, at: usize) -> Result<bool> {
        let Some(status) = self.has_ended(at)? else { return Ok(false) };
        self.last_words(at).await?;
        let seat = &mut self.seats[at];
        if !seat.done && !was_killed(status) {
            return Err(self.broken(status));
        }
        seat.child = None;
        if seat.done {
            return Ok(false);
        }
        seat.journal.close_books()?;
        seat.incarnation += 1;
        self.killed += 1;
        Ok(true)
    }

    fn has_ended(&mut self, at: usize) -> Result<Option<ExitStatus>> {
        let child = self.seats[at].child.as_mut();
        Ok(child.map(Child::ended).transpose().map_err(|e| no_worker(&e))?.flatten())
    }

    fn broken(&self, status: ExitStatus) -> Error {
        let said = self.seats.iter().filter_map(|seat| seat.child.as_ref()).map(Child::other_lines).collect::<Vec<_>>();
        let text = format!("a worker process ended by itself: {status}");
        Error::new(ErrorKind::Unexpected, "hammer", text).with_source(said.join("\n"))
    }

    /// Ends the run: everybody finishes what he is at.
    async fn dismiss(&mut self) -> Result<()> {
        self.tell_all(STOP);
        let patience = Instant::now() + GRACE + self.hammer.lease * 4 + self.hammer.hold;
        loop {
            self.listen()?;
            self.end_stalls();
            for at in 0..self.seats.len() {
                if self.bury(at).await? {
                    self.seats[at].done = true;
                }
            }
            if self.seats.iter().all(|seat| seat.child.is_none()) {
                return Ok(());
            }
            if Instant::now() > patience {
                return Err(Error::new(ErrorKind::Unexpected, "hammer", "the workers did not end a minute after the run"));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn progress(&self, elapsed: Duration) -> Result<Progress> {
        let mut acked = 0;
        for seat in &self.seats {
            acked += seat.journal.resolved()?;
        }
        let done = match self.hammer.length {
            HammerLength::Time(time) => elapsed.as_secs_f64() / time.as_secs_f64(),
            HammerLength::Ops(ops) => acked as f64 / ops as f64,
        };
        Ok(Progress { elapsed, done: done.min(1.0), acked, killed: self.killed, stalled: self.stalled })
    }
}

fn was_killed(status: ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt;
    status.signal() == Some(nix::sys::signal::Signal::SIGKILL as i32)
}

fn no_worker(error: &io::Error) -> Error {
    Error::new(ErrorKind::Unexpected, "hammer", "a worker process could not be started").with_source(error.to_string())
}

/// What a worker says.
enum Word {
    Ready,
    Done,
    /// The first call that its store did not answer.
    Error(String),
}

fn hear(line: &str) -> Result<Word> {
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    match word {
        READY => Ok(Word::Ready),
        DONE => Ok(Word::Done),
        FAILED => Err(failure(rest)),
        _ => Ok(Word::Error(rest.to_owned())),
    }
}

fn failure(text: &str) -> Error {
    const KINDS: [ErrorKind; 4] = [ErrorKind::Unavailable, ErrorKind::Config, ErrorKind::Unsupported, ErrorKind::Corrupt];
    let (kind, text) = text.split_once(' ').unwrap_or((text, ""));
    let kind = KINDS.into_iter().find(|known| known.as_str() == kind).unwrap_or(ErrorKind::Unexpected);
    Error::new(kind, "hammer", format!("a worker process stopped: {text}"))
}

/// Where the journals lie while a run lasts.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Result<Self> {
        let random = WriteId::random()?.to_bytes();
        let name = random[..8].iter().fold(String::from("sessionkit-hammer-"), |name, byte| format!("{name}{byte:02x}"));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).map_err(|e| journal::broken(&e))?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // What remains is small and in the directory for such things.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
