//! The command line as a type: what can be said, and what its help says.
//!
//! Nothing here knows how a command is carried out. Ids and DSNs are taken as plain text and checked later, because clap repeats a
//! refused value in its message, and these two may be secrets.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use session_core::parse_duration;

const AFTER_HELP: &str = "\
Stores:
  file:///srv/sessions?depth=2&durability=none|data|full
  redis://[user:password@]host:6379/0   rediss://…   redis+unix:///run/redis.sock?db=0
  redis+sentinel://h1,h2,h3/mymaster   redis+cluster://h1,h2,h3
    each with ?timeout= connect_timeout= wait_replicas= wake=push|poll
  postgres://[user:password@]host:5432/database   mysql://…   sqlite:///path/sessions.db
    each with ?table= create=on|off connections= timeout= connect_timeout=
  memory://
  with any of ttl= absolute_ttl= wait= lease= max_hold= locking=on|off queue= strict_expiry=
  hash_ids= codec= max_bytes= prefix=; lengths of time are 500ms, 30s, 20m, 2h

Exit status:
  0  done
  1  the answer is no: absent, locked by somebody else, updates lost, a case failed
  2  usage or configuration
  3  the store did not answer

Example:
  sessionctl incr file:///srv/sessions $ID visits --times 100";

/// Checks a session store, hammers it, looks into it, measures it. Without a command it opens the lab.
#[derive(Debug, Parser)]
#[command(name = "sessionctl", version, about, after_help = AFTER_HELP, max_term_width = 100)]
#[command(infer_subcommands = false)]
pub(crate) struct Cli {
    /// One JSON object per line on stdout, and nothing else there
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Shows the lost update, and shows it gone: a page that runs parallel requests on a real store
    ///
    /// Prints the address of the page and serves it until it is told to end (Ctrl-C). Without --dsn it offers files and SQLite in a
    /// temporary directory, which goes with it, and memory. Every address of the page answers with its numbers as JSON if it is
    /// asked for application/json, or with ?format=json. It answers no page but its own: requests of other origins and sites, and
    /// those sent to another name than the one it listens at, are refused. Ids and payloads never leave it.
    #[command(
        after_help = "Examples:\n  sessionctl lab\n  sessionctl lab --dsn redis://127.0.0.1/0 --dsn 'postgres://me:pw@127.0.0.1/app?create=on'\n  curl 'http://127.0.0.1:3000/?format=json'"
    )]
    Lab(LabArgs),
    /// Holds a store to the contract: the conformance suite, case by case
    ///
    /// Each case runs in a namespace of its own: for file:// a fresh directory inside the given one, removed at the end; for a
    /// server a prefix of its own, whose sessions are destroyed after each case; for memory:// a new store. The cases with several
    /// processes run for stores that processes can share, and those that count round trips for one server in plain TCP. What a
    /// store cannot be held to is left out, and said at the end.
    #[command(
        after_help = "Examples:\n  sessionctl check file:///srv/sessions\n  sessionctl check redis://127.0.0.1/0\n  sessionctl check memory:// --only fenced"
    )]
    Check(CheckArgs),
    /// Proves that nothing is lost: processes that append, stall and die over shared sessions
    ///
    /// Worker processes append to and count up in shared sessions, each under the access you name, while some are stalled past their
    /// lease and some are killed. In the end every acknowledged change must be there. A store that is away for up to half a minute
    /// is waited for; changes that it does not answer count as unknown.
    #[command(
        after_help = "Examples:\n  sessionctl hammer file:///srv/sessions --processes 8 --kill 5\n  sessionctl hammer 'redis://127.0.0.1/0?wake=poll'    # beside the same with wake=push\n  sessionctl hammer file:///srv/sessions --access none    # the control group: this loses updates"
    )]
    Hammer(HammerArgs),
    /// Prints a value, or all values, of a session as JSON; takes no lock
    ///
    /// An absent session or key prints nothing, and the exit status is 1.
    #[command(after_help = "Example:\n  sessionctl get file:///srv/sessions $ID cart")]
    Get(GetArgs),
    /// Stores a value under the lock; creates the session if it is absent
    #[command(after_help = "Example:\n  sessionctl set file:///srv/sessions $ID name '\"Ada\"'")]
    Set(SetArgs),
    /// Counts a value up, each time under the lock; creates what is absent
    ///
    /// Each time: open exclusively, read, wait for --hold, write, close. Prints the final value.
    #[command(after_help = "Example:\n  sessionctl incr file:///srv/sessions $ID visits --times 100 --hold 5ms")]
    Incr(IncrArgs),
    /// Takes the lock of a session and keeps it
    ///
    /// Prints "held" once it has the lock, renews it, and gives it back after --seconds or when told to end (SIGINT, SIGTERM). An
    /// absent session can be held; nothing is stored under it.
    #[command(after_help = "Example:\n  sessionctl hold file:///srv/sessions $ID --seconds 10")]
    Hold(HoldArgs),
    /// Removes a session, whoever holds it
    ///
    /// A logout never waits. If the session was absent, the exit status is 1.
    #[command(after_help = "Example:\n  sessionctl rm file:///srv/sessions $ID")]
    Rm(RmArgs),
    /// Lists live sessions: handle, bytes, what is left of their lives
    ///
    /// A handle is never a live id. Behind hash_ids it is the stored hash; with hash_ids=off it is a short hash, sid:….
    #[command(after_help = "Example:\n  sessionctl ls file:///srv/sessions --limit 20")]
    Ls(LsArgs),
    /// Lists held locks: handle, holder, for how long, how many wait
    #[command(after_help = "Example:\n  sessionctl locks file:///srv/sessions")]
    Locks(LocksArgs),
    /// Takes the lock of a session from whoever holds it
    ///
    /// The holder's next write is refused once somebody else has taken over. If nobody holds it, the exit status is 1. A lock that
    /// only the end of the holding process can free (files) is refused with the holder's name.
    #[command(after_help = "Example:\n  sessionctl unlock file:///srv/sessions sid:0f3a9c2b7d41e685")]
    Unlock(UnlockArgs),
    /// Frees the space of expired sessions, in batches, and prints how many
    #[command(after_help = "Example:\n  sessionctl gc file:///srv/sessions --limit 10000")]
    Gc(GcArgs),
    /// Measures cycles per second and waits, beside the raw floor
    ///
    /// A cycle is: open exclusively, read, write, close. Every task has a session of its own; there
    /// is 1 task, then there are 16, and 64 on a server. What is compared runs in the same place, in
    /// the same run, in turns (A B C, A B C, …); the medians over the rounds are printed.
    ///
    ///   floor      files: a plain program on plain threads: open, flock, pread, pwrite in place,
    ///              close; with fdatasync after the write for durability=data and full
    ///              redis://: the same client, bare: SET lock NX PX and GET in one pipeline, then a
    ///              script that compares, writes and unlocks
    ///              SQL: the same client, bare: the two statements of an uncontended cycle of ours,
    ///              prepared, on as many connections; SQLite: one thread, each statement a commit
    ///   cycle      our handler: open, read, save
    ///   session    all of ours: open, get, insert, close; ids hashed, values encoded, tasks queued
    ///   rename     files: a plain program on plain threads: flock on a lock file, read, write a
    ///              temporary file, fdatasync for data and full, rename, fsync the directory for full
    ///   unlocked   redis://: the same client, bare: GET, then SET, without any lock
    ///              SQL: the same client, bare: SELECT, then UPDATE by key
    ///   pgbench    PostgreSQL, where it is installed: the statements of the floor in pgbench
    ///   peer       load, save of tower-sessions-file-store, which neither locks nor syncs, and of
    ///              tower-sessions-redis-store with a pool of six connections, which does not lock;
    ///              with --peers, of tower-sessions-sqlx-store, which does not lock either
    ///   record     redis://: our handler with the peer's records in the peer's encoding: what its
    ///              store does, locked
    ///   peer_session
    ///              redis://: the peer's session, as an application calls it: get, insert, save
    ///   web        with --web, in place of all these: a whole axum request over a connection that
    ///              stays open, which reads a number in its visitor's session and writes the next
    ///   tower_sessions, axum_session
    ///              the same with these middlewares and their own stores for Redis and PostgreSQL, which
    ///              do not lock; axum_session keeps all sessions in its process besides
    ///   cycle_vs_rename, cycle_vs_unlocked, cycle_vs_pgbench, record_vs_peer, session_vs_peer_session,
    ///   session_vs_peer
    ///              how many times faster ours is (the peer: only where ours does not sync either)
    ///   handover_processes
    ///              from a holder's close to where the waiter's open returns, in another process
    ///   handover_tasks
    ///              the same between two tasks of one process
    ///
    ///   many_vs_few, during_gc_vs_without
    ///              with --rows: a cycle in a table of many sessions beside one in a table of few; of 16
    ///              tasks while those that have expired are collected, beside the same for as long
    ///              after that
    ///   p999_during_gc, p999_without_gc, longest_during_gc, longest_without_gc
    ///              with --rows: the slowest cycle in a thousand of these, and the slowest of all
    ///   gc_batch   with --rows: what it takes to collect up to 1,000
    ///
    /// The ratio is the cycles of a line divided by the cycles beside it: the floor's, except in the
    /// lines that say otherwise. Trips are the round trips of a cycle, counted with one task at a
    /// proxy, in a pass of its own. memory:// has no floor, and gets cycle and session; so do
    /// the other kinds of Redis, with hand-overs.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  sessionctl bench file:///srv/sessions 'file:///srv/sessions?durability=data'\n  sessionctl bench redis://127.0.0.1/0 --json"
    )]
    Bench(BenchArgs),
    /// Prints a completion script for your shell
    #[command(after_help = "Example:\n  sessionctl completions bash > /etc/bash_completion.d/sessionctl")]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Takes part in a measurement or a case, as a process of its own
    #[command(hide = true, name = "__worker")]
    Worker {
        /// In what
        part: Part,
    },
}

/// What a worker process takes part in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    Case,
    Handover,
    Hammer,
}

impl Part {
    /// The words that start this program as such a worker.
    pub(crate) fn words(self) -> [&'static str; 2] {
        let part = match self {
            Self::Case => "case",
            Self::Handover => "handover",
            Self::Hammer => "hammer",
        };
        ["__worker", part]
    }
}

#[derive(Debug, Args)]
pub(crate) struct LabArgs {
    /// A store to offer; may be given several times. Those that do not answer are asked again when the page is opened
    #[arg(long = "dsn", value_name = "DSN")]
    pub(crate) dsns: Vec<String>,
    /// The port to listen at; 0 takes a free one
    #[arg(long, default_value_t = 3000)]
    pub(crate) port: u16,
    /// The address to listen at
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: String,
}

impl Default for LabArgs {
    fn default() -> Self {
        Self { dsns: Vec::new(), port: 3000, host: "127.0.0.1".into() }
    }
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The store
    pub(crate) dsn: String,
    /// Only the case of this name, or, if there is none, the cases whose names contain it
    #[arg(long, value_name = "CASE")]
    pub(crate) only: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct HammerArgs {
    /// The store
    pub(crate) dsn: String,
    /// Worker processes
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) processes: u32,
    /// Tasks in each process
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) tasks: u32,
    /// Sessions that all of them share
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) sessions: u32,
    /// How long to go on
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=86_400), value_name = "N")]
    pub(crate) seconds: u64,
    /// Stop after this many acknowledged changes instead
    #[arg(long, conflicts_with = "seconds", value_parser = clap::value_parser!(u64).range(1..), value_name = "N")]
    pub(crate) ops: Option<u64>,
    /// How the sessions are opened; "none" writes without lock and fence, as the control group
    #[arg(long, value_enum, default_value_t = HammerAccess::Exclusive)]
    pub(crate) access: HammerAccess,
    /// Share of the changes during which the worker is stopped past its lease
    #[arg(long, default_value_t = 0.0, value_parser = percent, value_name = "PERCENT")]
    pub(crate) stall: f64,
    /// Share of the changes during which the worker is killed
    #[arg(long, default_value_t = 0.0, value_parser = percent, value_name = "PERCENT")]
    pub(crate) kill: f64,
    /// Length of the lease, instead of the DSN's
    #[arg(long, value_parser = duration, value_name = "DUR")]
    pub(crate) lease: Option<Duration>,
    /// How long each change keeps the session open
    #[arg(long, default_value = "0ms", value_parser = duration, value_name = "DUR")]
    pub(crate) hold: Duration,
    /// Bytes in each session besides what is counted
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=16_777_216), value_name = "BYTES")]
    pub(crate) payload: u32,
    /// Repeats the random choices of an earlier run
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum HammerAccess {
    Exclusive,
    Optimistic,
    Merge,
    None,
}

#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    /// The store
    pub(crate) dsn: String,
    /// The session's id
    pub(crate) id: String,
    /// The key; without it, the whole session as one object
    pub(crate) key: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct SetArgs {
    /// The store
    pub(crate) dsn: String,
    /// The session's id
    pub(crate) id: String,
    /// The key
    pub(crate) key: String,
    /// The value, as JSON; a text needs its own quotes: '"Ada"'
    #[arg(value_name = "JSON", allow_hyphen_values = true)]
    pub(crate) value: String,
}

#[derive(Debug, Args)]
pub(crate) struct IncrArgs {
    /// The store
    pub(crate) dsn: String,
    /// The session's id
    pub(crate) id: String,
    /// The key
    pub(crate) key: String,
    /// How many times
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..), value_name = "N")]
    pub(crate) times: u64,
    /// How long to keep the session open between read and write
    #[arg(long, default_value = "0ms", value_parser = duration, value_name = "DUR")]
    pub(crate) hold: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct HoldArgs {
    /// The store
    pub(crate) dsn: String,
    /// The session's id
    pub(crate) id: String,
    /// Give it back after this long; without it, when told to end
    #[arg(long, value_name = "N")]
    pub(crate) seconds: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// The store
    pub(crate) dsn: String,
    /// The session's id
    pub(crate) id: String,
}

#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// The store
    pub(crate) dsn: String,
    /// At most this many
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<NonZeroU32>,
}

#[derive(Debug, Args)]
pub(crate) struct LocksArgs {
    /// The store
    pub(crate) dsn: String,
    /// At most this many
    #[arg(long, default_value = "1000", value_name = "N")]
    pub(crate) limit: NonZeroU32,
}

#[derive(Debug, Args)]
pub(crate) struct UnlockArgs {
    /// The store
    pub(crate) dsn: String,
    /// The session's id, or its handle as "ls" and "locks" print it
    pub(crate) id: String,
}

#[derive(Debug, Args)]
pub(crate) struct GcArgs {
    /// The store
    pub(crate) dsn: String,
    /// Stop after this many
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<NonZeroU32>,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// The stores, one after the other
    #[arg(required = true, value_name = "DSN")]
    pub(crate) dsns: Vec<String>,
    /// Rounds; the medians over them are printed
    #[arg(long, default_value_t = 21, value_parser = clap::value_parser!(u32).range(1..=1000), value_name = "N")]
    pub(crate) rounds: u32,
    /// How long each contender runs in each round
    #[arg(long, default_value = "70ms", value_parser = duration, value_name = "DUR")]
    pub(crate) round: Duration,
    /// Bytes in each session
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=1_048_576), value_name = "BYTES")]
    pub(crate) payload: u32,
    /// How many hand-overs to time
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "N")]
    pub(crate) handovers: u32,
    /// SQL only: measures also in a table with this many sessions beside one with a thousand, and while a tenth of them, which
    /// has expired, is collected
    #[arg(long, value_name = "N")]
    pub(crate) rows: Option<NonZeroU32>,
    /// Measure whole axum requests, beside those of tower-sessions and axum_session where --peers is given
    #[arg(long, conflicts_with = "rows")]
    pub(crate) web: bool,
    /// The program that runs the peers of SQL databases, which cannot be linked into this one: "cargo xtask bench" builds it
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) peers: Option<PathBuf>,
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| "expected a duration such as 500ms, 30s, 20m or 2h".into())
}

fn percent(text: &str) -> Result<f64, String> {
    match text.strip_suffix('%').unwrap_or(text).parse::<f64>() {
        Ok(number) if (0.0..=100.0).contains(&number) => Ok(number),
        _ => Err("expected a number from 0 to 100".into()),
    }
}
