//! From settings to servers: addresses, credentials, certificates, sentinels.
//!
//! What may be set, and how it is written, is not known here.

use std::sync::Arc;
use std::time::Duration;

use redis::sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType};
use redis::{Client, ConnectionAddr, IntoConnectionInfo, RedisConnectionInfo, RedisError};
#[cfg(feature = "tls")]
use redis::{TlsCertificates, TlsMode};
use session_core::{Error, ErrorKind, Result};

use crate::cluster::Cluster;
use crate::config::{RedisConfig, RedisServers};
use crate::link::{Link, Maker, Timeouts};
use crate::replicas::Replicas;
use crate::servers::Servers;
use crate::store::Store;

impl RedisConfig {
    /// Connects, so that a wrong setting is found now and not by the first visitor.
    pub(crate) async fn connect(self) -> Result<Arc<Store>> {
        self.check()?;
        let servers = self.servers()?;
        self.greet(servers).await
    }

    pub(crate) async fn connect_with(self, client: Client) -> Result<Arc<Store>> {
        self.check()?;
        let link = || Link::new(Maker::Client(Box::new(client.clone())), self.timeouts());
        let servers = Servers::One { replicas: self.replicas(link), link: link() };
        self.greet(servers).await
    }

    async fn greet(self, servers: Servers) -> Result<Arc<Store>> {
        let store = Store::new(servers, self)?;
        store.greet().await.map_err(|failure| failure.into_error("connect"))?;
        Ok(store)
    }

    fn timeouts(&self) -> Timeouts {
        Timeouts { connect: self.connect_timeout, answer: self.timeout }
    }

    /// How long a batch of changes waits for replicas: less than its answer is waited for.
    fn patience(&self) -> Duration {
        self.timeout.mul_f64(0.75)
    }

    fn replicas(&self, link: impl Fn() -> Link) -> Option<Replicas> {
        (self.wait_replicas > 0).then(|| Replicas::new(link(), self.wait_replicas, self.patience()))
    }

    fn settings(&self) -> RedisConnectionInfo {
        let mut settings = RedisConnectionInfo::default().set_db(i64::from(self.database));
        if let Some(user) = &self.user {
            settings = settings.set_username(user);
        }
        if let Some(password) = &self.password {
            settings = settings.set_password(password);
        }
        settings
    }

    /// Makes what makes clients for an address.
    fn client_at(&self) -> Result<impl Fn(ConnectionAddr) -> Result<Client, RedisError> + Clone + Send + Sync + 'static> {
        let settings = self.settings();
        #[cfg(feature = "tls")]
        let certificates = self.certificates()?;
        Ok(move |address: ConnectionAddr| {
            let info = address.into_connection_info()?.set_redis_settings(settings.clone());
            #[cfg(feature = "tls")]
            if let ConnectionAddr::TcpTls { .. } = info.addr() {
                return Client::build_with_tls(info, certificates.clone());
            }
            Client::open(info)
        })
    }

    #[cfg(feature = "tls")]
    fn certificates(&self) -> Result<TlsCertificates> {
        if self.tls {
            // The one that the application has chosen stays; without one no connection could be made.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let root_cert = match &self.ca {
            None => None,
            Some(path) => Some(std::fs::read(path).map_err(|error| {
                let fact = format!("the certificates at ca={} cannot be read", path.display());
                Error::new(ErrorKind::Config, "redis", fact).with_source(error)
            })?),
        };
        Ok(TlsCertificates { client_tls: None, root_cert })
    }

    fn address(&self, host: &str, port: u16) -> ConnectionAddr {
        if self.tls {
            ConnectionAddr::TcpTls { host: host.into(), port, insecure: false, tls_params: None }
        } else {
            ConnectionAddr::Tcp(host.into(), port)
        }
    }

    fn servers(&self) -> Result<Servers> {
        let client_at = self.client_at()?;
        let unusable = |error: RedisError| {
            Error::new(ErrorKind::Config, "connect", "the address or a certificate cannot be used").with_source(error)
        };
        let one = |address: ConnectionAddr| {
            let client = client_at(address).map_err(unusable)?;
            let link = || Link::new(Maker::Client(Box::new(client.clone())), self.timeouts());
            Ok(Servers::One { replicas: self.replicas(link), link: link() })
        };
        match &self.servers {
            RedisServers::Tcp { host, port } => one(self.address(host, *port)),
            RedisServers::Unix(path) => one(ConnectionAddr::Unix(path.clone())),
            RedisServers::Sentinel { sentinels, master } => {
                let make = || self.sentinels(sentinels, master).map_err(unusable);
                let link = |client| Link::new(Maker::Sentinel(Box::new(tokio::sync::Mutex::new(client))), self.timeouts());
                let replicas = match self.wait_replicas {
                    0 => None,
                    count => Some(Replicas::new(link(make()?), count, self.patience())),
                };
                Ok(Servers::One { link: link(make()?), replicas })
            }
            RedisServers::Cluster { seeds } => {
                let tls = self.clone();
                let at = Box::new(move |host: &str, port| client_at(tls.address(host, port)));
                let wait = (self.wait_replicas > 0).then(|| (self.wait_replicas, self.patience()));
                Ok(Servers::Cluster(Cluster::new(seeds.clone(), at, self.timeouts(), wait)))
            }
        }
    }

    fn sentinels(&self, sentinels: &[(String, u16)], master: &str) -> Result<SentinelClient, RedisError> {
        let addresses = sentinels.iter().map(|(host, port)| self.address(host, *port));
        let mut builder = SentinelClientBuilder::new(addresses, master, SentinelServerType::Master)?
            .set_client_to_redis_db(i64::from(self.database));
        if let Some(user) = &self.user {
            builder = builder.set_client_to_redis_username(user);
        }
        if let Some(password) = &self.password {
            builder = builder.set_client_to_redis_password(password);
        }
        if let Some((user, password)) = &self.sentinel_auth {
            if let Some(user) = user {
                builder = builder.set_client_to_sentinel_username(user);
            }
            builder = builder.set_client_to_sentinel_password(password);
        }
        #[cfg(feature = "tls")]
        if self.tls {
            let certificates = self
                .certificates()
                .map_err(|_| RedisError::from((redis::ErrorKind::InvalidClientConfig, "the certificates cannot be read")))?;
            builder = builder
                .set_client_to_redis_tls_mode(TlsMode::Secure)
                .set_client_to_redis_certificates(certificates.clone())
                .set_client_to_sentinel_tls_mode(TlsMode::Secure)
                .set_client_to_sentinel_certificates(certificates);
        }
        builder.build()
    }
}
