//! pgbench with the SQL of the plain program that locks: what the server gives to a client in C.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use session_core::{Dsn, SessionId};
use sessionkit::sql::{SqlConfig, SqlServer};
use tempfile::TempDir;
use tokio::process::Command;

use super::postgres::{Plain, ours};
use super::{LEASE, TTL, endpoint, failed, millis, owner};
use crate::bench::Round;
use crate::failure::Failure;

/// Cycles of a client in a run at least.
const FIRST: u64 = 20;

/// What does not count of these: each run connects anew and prepares its statements in the first, where ours has done so before.
const WARM: u32 = 4;

/// The most bytes of a payload, which is an argument of a statement in text.
pub(crate) const LARGEST: usize = 64 << 10;

/// pgbench, and the rows of its clients.
pub(crate) struct Pgbench {
    program: PathBuf,
    config: SqlConfig,
    plain: Plain,
    keys: Vec<String>,
    /// The script, and what it writes down.
    directory: TempDir,
    cycles: AtomicU64,
}

/// Returns where pgbench is, if it is installed.
pub(crate) fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<_> = std::env::split_paths(&path).collect();
    // Debian keeps the programs of PostgreSQL by version.
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    places.extend(versions.map(|version| version.path().join("bin")));
    places.into_iter().map(|place| place.join("pgbench")).find(|program| program.is_file())
}

impl Pgbench {
    pub(crate) async fn prepare(program: PathBuf, dsn: &str, tasks: usize, payload: usize) -> Result<Option<Self>, Failure> {
        let config = SqlConfig::from_dsn(&Dsn::parse(dsn)?)?;
        let SqlServer::Postgres(address) = &config.server else { return Ok(None) };
        // Its clients are connections, of which ours has no more than these.
        let clients = tasks.min(config.connections() as usize);
        let base = format!("{}{}-", config.prefix, SessionId::generate()?.as_str());
        let keys: Vec<_> = (0..clients).map(|client| format!("{base}{client}")).collect();
        let plain = Plain::connect(address, &config, 1).await.map_err(failed)?;
        plain.fill(&keys, &vec![b'x'; payload], millis(TTL)).await?;
        let directory = tempfile::tempdir().map_err(Failure::local("make a directory for the script of pgbench"))?;
        std::fs::write(directory.path().join("script"), script(ours(&config).map_err(failed)?, &base))
            .map_err(Failure::local("write the script of pgbench"))?;
        Ok(Some(Self { program, plain, keys, directory, cycles: AtomicU64::new(FIRST), config }))
    }

    pub(crate) async fn run(&self, length: Duration) -> Result<Round, Failure> {
        let SqlServer::Postgres(address) = &self.config.server else { return Err(Failure::no("pgbench is for PostgreSQL")) };
        let (host, port) = endpoint(address, 5432);
        let (clients, cycles) = (self.keys.len(), self.cycles.load(Ordering::Relaxed));
        let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get().min(clients));
        let mut command = Command::new(&self.program);
        command.args(["-n", "-M", "prepared", "-f", "script", "-l", "--log-prefix=log"]);
        command.args(["-c", &clients.to_string(), "-j", &threads.to_string(), "-t", &cycles.to_string()]);
        let host = address.socket.as_ref().and_then(|path| path.to_str()).unwrap_or(host);
        command.args(["-h", host, "-p", &port.to_string()]);
        command.args(address.user.iter().flat_map(|user| ["-U", user])).arg(&address.database);
        if let Some(password) = &address.password {
            // Not on the command line, where every user of the machine could read it.
            command.env("PGPASSWORD", password);
        }
        let ran = command.current_dir(self.directory.path()).stdin(Stdio::null()).kill_on_drop(true).output().await;
        let ran = ran.map_err(Failure::local("run pgbench"))?;
        let waits = self.waits()?;
        if !ran.status.success() || waits.is_empty() {
            return Err(Failure::no("pgbench did not do what it was told"));
        }
        // Each client does one cycle after the other.
        let took = waits.iter().map(|wait| u64::from(*wait)).sum::<u64>().max(1) / clients as u64;
        let fit = u64::try_from(length.as_nanos()).unwrap_or(u64::MAX).saturating_mul(cycles) / took.max(1);
        self.cycles.store(fit.clamp(FIRST, 100_000), Ordering::Relaxed);
        let began = Instant::now();
        Ok(Round { ran: (began, began + Duration::from_nanos(took)), waits })
    }

    /// Reads how long each cycle took, and clears up.
    fn waits(&self) -> Result<Vec<u32>, Failure> {
        let failed = || Failure::local("read what pgbench wrote down");
        let mut waits = Vec::new();
        for entry in std::fs::read_dir(self.directory.path()).map_err(failed())? {
            let path = entry.map_err(failed())?.path();
            if path.file_name().is_some_and(|name| name != "script") {
                let text = std::fs::read_to_string(&path).map_err(failed())?;
                // Client, how many before, microseconds, …
                let cycles = text.lines().filter_map(|line| {
                    let mut numbers = line.split(' ').skip(1).map(str::parse::<u32>);
                    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
                });
                waits.extend(cycles.filter(|(before, _)| *before >= WARM).map(|(_, micros)| micros.saturating_mul(1000)));
                std::fs::remove_file(&path).map_err(failed())?;
            }
        }
        Ok(waits)
    }

    /// Removes what was stored.
    pub(crate) async fn remove(&self) -> Result<(), Failure> {
        Ok(self.plain.remove(&self.keys).await?)
    }
}

/// Writes the two statements as pgbench reads them. It knows numbers and text, of which the server makes what is needed.
fn script([open, save]: [String; 2], base: &str) -> String {
    let sixteen = |name: &str| format!("decode(lpad(to_hex(:{name}::int8), 32, '0'), 'hex')");
    // In digits, because it takes every word behind a colon for a variable, in quotes, too.
    let base = base.bytes().fold(String::new(), |digits, byte| digits + format!("{byte:02x}").as_str());
    let (key, token) = (format!("(convert_from('\\x{base}', 'UTF8') || :client_id)"), sixteen("token"));
    let fill = |text: String, values: [&str; 6]| {
        values.iter().enumerate().fold(text, |text, (n, value)| text.replace(&format!("${}", n + 1), value))
    };
    let (lease, ttl) = (format!("{}::int8", millis(LEASE)), format!("{}::int8", millis(TTL)));
    let open = fill(open, [&key, &token, &lease, &format!("'{}'", owner()), "1", ""]);
    let save = fill(save, [&key, ":open_write_id::bytea", &token, &ttl, &sixteen("write"), ":open_data::bytea"]);
    let name = "random(1, 9000000000000000000)";
    format!("\\set token {name}\n\\set write {name}\n{open}\n\\gset open_\n{save};\n")
}

#[cfg(test)]
mod tests {
    use sessionkit::sql::SqlAddress;

    use super::*;

    #[test]
    fn the_script_has_a_value_in_every_place() {
        let config = SqlConfig::new(SqlServer::Postgres(SqlAddress::default())).with_table("app.sessions");
        let script = script(ours(&config).unwrap(), "p:id-");
        assert!(!script.contains('$') && !script.contains('{'), "{script}");
        assert!(
            script.contains("\"app\".\"sessions\"") && script.contains("'\\x703a69642d'") && !script.contains("p:id"),
            "{script}"
        );
    }
}
