//! A MariaDB server of its own for each test.
//!
//! Nothing here knows tables or statements of a backend.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::mariadb_wire::MariaDbConnection;
use super::process::{Account, Port, Program, Server, on_free_ports};
use super::sql::{self, NAME, PASSWORD};
use super::template::Template;

const PROGRAM: Program = Program { name: "mariadbd", package: "mariadb-server-core" };

/// Who the server may be if we are root, which it refuses to be: the one of Debian's service, which does not come with the program,
/// or anybody.
const ACCOUNTS: &[&str] = &["mysql", "nobody"];

/// Who may do everything, and only on the socket.
const SUPERUSER: &str = "root";

/// Survives being killed, and not a power failure; answers on the loopback and on a socket in its directory only. Small, because it
/// is copied for each server; the file for what is temporary is made by each.
const SETTINGS: &str = "\
[mysqld]
bind_address = 127.0.0.1
socket = mariadb.sock
skip_name_resolve
character_set_server = utf8mb4
collation_server = utf8mb4_general_ci
max_connections = 200
innodb_flush_log_at_trx_commit = 2
innodb_flush_method = nosync
innodb_buffer_pool_size = 32M
innodb_buffer_pool_load_at_startup = off
innodb_buffer_pool_dump_at_shutdown = off
innodb_log_file_size = 8M
innodb_autoextend_increment = 1
innodb_data_file_path = ibdata1:2M:autoextend
innodb_temp_data_file_path = ibtmp1:2M:autoextend
key_buffer_size = 1M
aria_pagecache_buffer_size = 8M
aria_log_file_size = 8M
";

/// What is done to a new data directory, after the files that come with the program. In the beginning nobody is asked who he is.
const FIRST: &str = "\
FLUSH PRIVILEGES;
CREATE USER root@localhost;
GRANT ALL ON *.* TO root@localhost WITH GRANT OPTION;
CREATE DATABASE sessionkit;
CREATE USER sessionkit@'%' IDENTIFIED BY 'conformance';
GRANT ALL ON sessionkit.* TO sessionkit@'%';
";

/// The files that come with the program, by what follows the name of the family.
const FILES: [&str; 2] = ["system_tables.sql", "performance_tables.sql"];

/// Where the data is, in the directory of the server.
const DATA: &str = "data";

/// Where temporary tables are.
const TEMPORARY: &str = "temporary";

const CONFIG: &str = "mariadb.cnf";

const SOCKET: &str = "mariadb.sock";

/// A MariaDB server.
///
/// Dropping it kills it and removes its data.
pub struct MariaDb {
    server: Server,
    port: Port,
}

impl fmt::Debug for MariaDb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MariaDb").field("address", &self.address()).field("pid", &self.pid()).finish_non_exhaustive()
    }
}

impl MariaDb {
    /// Starts a server and returns once it answers. Each option is a line of its configuration file, such as
    /// `"innodb_lock_wait_timeout = 1"`, `"max_connections = 10"` or `"innodb_flush_log_at_trx_commit = 1"`.
    ///
    /// It has one database, `sessionkit`, in which the user of the same name may do everything.
    ///
    /// # Errors
    /// `NotFound` with the name of the package if MariaDB is not installed; with the server's own words if it does not like an
    /// option.
    pub fn start(options: &[&str]) -> io::Result<Self> {
        on_free_ports(|| {
            let mariadb = Self::prepare(options)?;
            mariadb.restart()?;
            Ok(mariadb)
        })
    }

    /// Makes all but the process.
    fn prepare(options: &[&str]) -> io::Result<Self> {
        let program = PROGRAM.find()?;
        let account = Account::unprivileged(ACCOUNTS)?;
        let (directory, port) = (account.directory("mariadb-")?, Port::free()?);
        let place = |name| directory.path().join(name);
        let template = Template::of(&program, account, (SETTINGS, FIRST))?;
        template.copy(&place(DATA), |empty| initialize(&program, account, empty))?;
        fs::create_dir(place(TEMPORARY))?;
        account.own(&place(TEMPORARY))?;
        let lines = format!("port = {}\ntmpdir = ../{TEMPORARY}", port.number());
        fs::write(place(CONFIG), [&[SETTINGS, &lines], options].concat().join("\n") + "\n")?;
        account.own(&place(CONFIG))?;
        let arguments = vec![format!("--defaults-file={CONFIG}"), format!("--datadir={}", place(DATA).display())];
        let server = Server::new(&PROGRAM, directory, arguments)?.run_by(account);
        Ok(Self { server, port })
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

    /// Returns `mysql://sessionkit:password@127.0.0.1:port/sessionkit`.
    #[must_use]
    pub fn url(&self) -> String {
        self.url_of(NAME, PASSWORD)
    }

    /// Returns the same for another user, who may not exist.
    #[must_use]
    pub fn url_of(&self, user: &str, password: &str) -> String {
        sql::url("mysql", user, password, self.address())
    }

    /// Returns the path of the socket that it listens on besides. It lets in everybody who can reach it as `root`.
    #[must_use]
    pub fn socket_path(&self) -> PathBuf {
        self.server.directory().join(DATA).join(SOCKET)
    }

    /// Returns the directory of its data, which is gone with it.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.server.directory()
    }

    /// Returns the id of its process, `None` after [`kill`](Self::kill).
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.server.pid()
    }

    /// Says whether it runs and is not frozen.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.server.is_up()
    }

    /// Stops it, as a suspended machine or an overloaded host does, and returns once it stands still: connections stay open, new ones are accepted, and nothing is answered. It can be killed and dropped like this.
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

    /// Kills it, and returns once it is gone. Its port refuses connections and is given to nobody else. One that
    /// does not run stays so.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn kill(&self) -> io::Result<()> {
        self.server.kill()
    }

    /// Starts it again, after killing it if it runs, on the same port and with everything that it has acknowledged. Returns once it
    /// answers.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn restart(&self) -> io::Result<()> {
        self.server.spawn()?;
        // Asked on the socket, where nobody else can answer in its place.
        self.server.wait(|| Ok(self.query("SELECT 1")? == [["1"]]))
    }

    /// Does one or more statements, as a user who may do everything, on a connection of its own; see [`MariaDbConnection::query`].
    ///
    /// # Errors
    /// As [`MariaDbConnection::query`].
    pub fn query(&self, sql: &str) -> io::Result<Vec<Vec<String>>> {
        self.connect()?.query(sql)
    }

    /// Connects as a user who may do everything.
    ///
    /// # Errors
    /// As [`MariaDbConnection::query`].
    pub fn connect(&self) -> io::Result<MariaDbConnection> {
        MariaDbConnection::open(&self.socket_path(), SUPERUSER)
    }
}

/// Makes a data directory.
fn initialize(program: &Path, account: Account, data: &Path) -> io::Result<()> {
    let (statements, config) = (data.join("first.sql"), data.join(CONFIG));
    let mut text = "CREATE DATABASE mysql;\nUSE mysql;\n".to_owned();
    for name in FILES {
        text += &fs::read_to_string(file(program, name)?)?;
    }
    fs::write(&statements, text + FIRST)?;
    fs::write(&config, SETTINGS)?;
    let mut command = Command::new(program);
    account.run(&mut command);
    command.arg(format!("--defaults-file={}", config.display())).arg("--bootstrap");
    // A server that starts removes the temporary tables of all others from the place that they share.
    command.args(["datadir", "tmpdir"].map(|name| format!("--{name}={}", data.display())));
    sql::run(command.current_dir(data), File::open(&statements)?)?;
    fs::remove_file(statements)?;
    fs::remove_file(config)
}

/// Finds a file that comes with the program. The family has changed its name, and not everywhere.
fn file(program: &Path, name: &str) -> io::Result<PathBuf> {
    let prefix = program.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
    let names = ["mariadb", "mysql"];
    let places = names.iter().map(|folder| prefix.join("share").join(folder));
    let mut paths = places.flat_map(|place| names.map(|family| place.join(format!("{family}_{name}"))));
    let missing =
        || io::Error::new(io::ErrorKind::NotFound, format!("mariadbd has no {name} (Debian package {})", PROGRAM.package));
    paths.find(|path| path.is_file()).ok_or_else(missing)
}
