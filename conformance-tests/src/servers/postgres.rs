//! A PostgreSQL server of its own for each test.
//!
//! Nothing here knows tables or statements of a backend.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;

use super::postgres_wire::PostgresConnection;
use super::process::{Account, Port, Program, Server, on_free_ports};
use super::sql::{self, NAME, PASSWORD};
use super::template::Template;

const PROGRAM: Program = Program { name: "postgres", package: "postgresql" };

/// Who the server may be if we are root, which it refuses to be: the one of Debian's package, or anybody.
pub(super) const ACCOUNTS: &[&str] = &["postgres", "nobody"];

/// Who may do everything, and only on the socket.
pub(super) const SUPERUSER: &str = "postgres";

/// What a data directory is made with: small, and with passwords for who comes over the network. It is thrown away if it is not
/// finished, so it need not be durable.
const INITDB: &[&str] = &[
    "--username=postgres",
    "--auth-local=trust",
    "--auth-host=scram-sha-256",
    "--locale=C",
    "--encoding=UTF8",
    "--wal-segsize=1",
    "--no-sync",
    "--no-instructions",
];

/// What is done to a new data directory: in which database, and what, a statement a line.
///
/// One database is all that is copied for each server. A file system can be slow to create files where others were just deleted,
/// and each database is some hundreds.
const FIRST: &[(&str, &str)] = &[
    (
        "template1",
        "\
CREATE ROLE sessionkit LOGIN PASSWORD 'conformance';
ALTER DATABASE postgres RENAME TO sessionkit;
ALTER DATABASE sessionkit OWNER TO sessionkit;
ALTER DATABASE template0 IS_TEMPLATE false;
DROP DATABASE template0;
",
    ),
    (
        "sessionkit",
        "\
ALTER DATABASE template1 IS_TEMPLATE false;
DROP DATABASE template1;
",
    ),
];

/// Survives being killed, and not a power failure; answers on the loopback and on a socket in its directory only.
///
/// Shared memory lies in the data directory, but for the few bytes of [`LAST_RITES`].
const SETTINGS: &str = "\
listen_addresses = '127.0.0.1'
unix_socket_directories = '..'
fsync = off
full_page_writes = off
max_connections = 200
shared_buffers = 16MB
dynamic_shared_memory_type = mmap
min_wal_size = 2MB
max_wal_size = 64MB
autovacuum = off
jit = off
";

/// Where the data is, in the directory of the server.
const DATA: &str = "data";

/// A server that is killed leaves a segment of System V behind, of which a machine has only some thousands, and its file of locks,
/// which has the number of the segment. That file, and the one of the socket, would keep the next start waiting for a process
/// that has the number of the old one.
const LAST_RITES: &str = "\
lock=data/postmaster.pid
[ ! -f $lock ] || ipcrm -m \"$(sed -n '7s/.* //p' $lock)\"
rm -f $lock .s.PGSQL.*";

/// A PostgreSQL server.
///
/// Dropping it kills it and removes its data.
pub struct Postgres {
    server: Server,
    port: Port,
}

impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Postgres").field("address", &self.address()).field("pid", &self.pid()).finish_non_exhaustive()
    }
}

impl Postgres {
    /// Starts a server and returns once it answers. Each option is a line of its configuration file, such as
    /// `"idle_in_transaction_session_timeout = 100"`, `"fsync = on"` or `"log_statement = all"`.
    ///
    /// It has one database, `sessionkit`, which belongs to the user of the same name, and has to be named as the template of
    /// another.
    ///
    /// # Errors
    /// `NotFound` with the name of the package if PostgreSQL is not installed; with the server's own words if it does not like an
    /// option.
    pub fn start(options: &[&str]) -> io::Result<Self> {
        on_free_ports(|| {
            let postgres = Self::prepare(options)?;
            postgres.restart()?;
            Ok(postgres)
        })
    }

    /// Makes all but the process.
    fn prepare(options: &[&str]) -> io::Result<Self> {
        let program = PROGRAM.find()?;
        let account = Account::unprivileged(ACCOUNTS)?;
        let (directory, port) = (account.directory("postgres-")?, Port::free()?);
        let data = directory.path().join(DATA);
        Template::of(&program, account, (INITDB, FIRST))?.copy(&data, |empty| initialize(&program, account, empty))?;
        let port_line = format!("port = {}", port.number());
        let config = data.join("postgresql.conf");
        fs::write(&config, [&[SETTINGS, &port_line], options].concat().join("\n") + "\n")?;
        account.own(&config)?;
        let server = Server::new(&PROGRAM, directory, vec!["-D".to_owned(), DATA.to_owned()])?;
        Ok(Self { server: server.run_by(account).with_last_rites(LAST_RITES), port })
    }

    /// Returns the port that it listens on, the same for life.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// Returns the address that it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// Returns `postgres://sessionkit:password@127.0.0.1:port/sessionkit`.
    #[must_use]
    pub fn url(&self) -> String {
        self.url_of(NAME, PASSWORD)
    }

    /// Returns the same for another user, who may not exist.
    #[must_use]
    pub fn url_of(&self, user: &str, password: &str) -> String {
        sql::url("postgres", user, password, self.address())
    }

    /// Returns the path of the socket that it listens on besides, in the directory that a client is told as the host. It lets in
    /// everybody who can reach it, as whoever he says to be.
    #[must_use]
    pub fn socket_path(&self) -> PathBuf {
        self.server.directory().join(format!(".s.PGSQL.{}", self.port()))
    }

    /// Returns the directory of its data, which is gone with it.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.server.directory()
    }

    /// Returns the id of the process that accepts connections, `None` after [`kill`](Self::kill).
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.server.pid()
    }

    /// Says whether it runs and is not frozen.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.server.is_up()
    }

    /// Stops all of its processes, as a suspended machine or an overloaded host does, and returns once they stand still: connections
    /// stay open, new ones are accepted, and nothing is answered. It can be killed and dropped like this.
    ///
    /// # Errors
    /// `NotConnected` if it does not run.
    pub fn freeze(&self) -> io::Result<()> {
        self.server.freeze()
    }

    /// Ends a [`freeze`](Self::freeze).
    ///
    /// # Errors
    /// `NotConnected` if it does not run.
    pub fn resume(&self) -> io::Result<()> {
        self.server.resume()
    }

    /// Kills all of its processes, and returns once they are gone. Its port refuses connections and is given to nobody else. One that
    /// does not run stays so.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn kill(&self) -> io::Result<()> {
        self.server.kill()
    }

    /// Has it stop at once, frozen or not, and returns once it is gone: transactions are lost, and clients that wait for no answer are
    /// told before their connections end. One that does not run stays so.
    ///
    /// # Errors
    /// `TimedOut` if it does not stop; it is killed then.
    pub fn stop_immediate(&self) -> io::Result<()> {
        self.server.end_by(Signal::SIGQUIT)
    }

    /// Starts it again, after killing it if it runs, on the same port and with everything that it has acknowledged. Returns once it
    /// answers.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn restart(&self) -> io::Result<()> {
        self.server.spawn()?;
        // Asked on the socket, where nobody else can answer in its place; and only when it has written down that it is ready, as
        // each question before would cost it a process.
        let lock = self.directory().join(DATA).join("postmaster.pid");
        let ready = || io::Result::Ok(fs::read_to_string(&lock)?.trim_end().ends_with("\nready"));
        self.server.wait(|| Ok(ready()? && self.query("SELECT 1")? == [["1"]]))
    }

    /// Does one or more statements, as a user who may do everything, on a connection of its own; see [`PostgresConnection::query`].
    ///
    /// # Errors
    /// As [`PostgresConnection::query`].
    pub fn query(&self, sql: &str) -> io::Result<Vec<Vec<String>>> {
        self.connect()?.query(sql)
    }

    /// Connects as a user who may do everything.
    ///
    /// # Errors
    /// As [`PostgresConnection::query`].
    pub fn connect(&self) -> io::Result<PostgresConnection> {
        PostgresConnection::open(&self.socket_path(), SUPERUSER, NAME)
    }
}

/// Makes a data directory.
fn initialize(program: &Path, account: Account, data: &Path) -> io::Result<()> {
    let mut command = Command::new(program.with_file_name("initdb"));
    account.run(&mut command);
    sql::run(command.args(INITDB).arg("-D").arg(data).current_dir(data), File::open("/dev/null")?)?;

    let statements = data.join("first.sql");
    for (database, first) in FIRST {
        fs::write(&statements, first)?;
        let mut command = Command::new(program);
        account.run(&mut command);
        command.args(["--single", "-c", "exit_on_error=on", "-c", "fsync=off", "-D"]).arg(data).arg(database);
        sql::run(command.current_dir(data), File::open(&statements)?)?;
    }
    fs::remove_file(statements)
}
