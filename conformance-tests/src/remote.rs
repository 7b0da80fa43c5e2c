//! A toy server before the liars' store, so that their flights can be counted.
//!
//! The server knows nothing: it answers each byte with itself. What a call does is decided in this process; over the wire goes one
//! byte for each flight that an honest handler would make, and more where the [`Flaw`] says so.

use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use async_trait::async_trait;
use session_core::{
    Access, Change, Error, ErrorKind, Expect, Held, OpenRequest, OpenSession, Record, Result, SessionAdmin, SessionHandler,
    SessionId, Ttl, WriteId, Written,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use crate::liars::Flaw;

/// The toy server, on the loopback until it is dropped.
#[derive(Debug)]
pub(crate) struct Echo {
    address: SocketAddr,
    accepting: JoinHandle<()>,
}

impl Echo {
    pub(crate) fn start() -> io::Result<Self> {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let (address, listener) = (listener.local_addr()?, TcpListener::from_std(listener)?);
        let accepting = tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = client.split();
                    // A client that has gone is the usual end.
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        Ok(Self { address, accepting })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// The connection of one handler.
#[derive(Debug)]
struct Wire(Mutex<TcpStream>);

impl Wire {
    /// Makes so many flights, one after the other.
    async fn fly(&self, flights: u32) -> Result<()> {
        let mut stream = self.0.lock().await;
        for _ in 0..flights {
            let trip = async {
                stream.write_all(b"?").await?;
                stream.read_u8().await
            };
            trip.await
                .map_err(|error| Error::new(ErrorKind::Unavailable, "fly", "the server is gone").with_source(error))?;
        }
        Ok(())
    }
}

/// A handler that asks the toy server before it does what it is told.
#[derive(Debug)]
pub(crate) struct Remote {
    inner: Arc<dyn SessionHandler>,
    wire: Arc<Wire>,
    flaw: Flaw,
}

impl Remote {
    pub(crate) async fn connect(inner: Arc<dyn SessionHandler>, server: SocketAddr, flaw: Flaw) -> io::Result<Self> {
        let stream = TcpStream::connect(server).await?;
        stream.set_nodelay(true)?;
        Ok(Self { inner, wire: Arc::new(Wire(Mutex::new(stream))), flaw })
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl SessionHandler for Remote {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        let flights = match (request.access, request.expect) {
            (Access::Destroy, _) => 0,
            (_, Expect::Fresh) => u32::from(self.flaw == Flaw::FreshAsksAtOpen),
            (Access::Exclusive { .. }, _) if self.flaw == Flaw::OpenLocksThenReads => 2,
            (Access::ReadOnly, _) if self.flaw == Flaw::ViewAsksTwice => 2,
            _ => 1,
        };
        self.wire.fly(flights).await?;
        let inner = self.inner.open(id, request).await?;
        Ok(Box::new(Opening { inner, wire: self.wire.clone(), flaw: self.flaw }))
    }

    async fn gc(&self, limit: NonZeroU32) -> Result<u64> {
        self.inner.gc(limit).await
    }

    fn admin(&self) -> Option<&dyn SessionAdmin> {
        self.inner.admin()
    }
}

#[derive(Debug)]
struct Opening {
    inner: Box<dyn OpenSession>,
    wire: Arc<Wire>,
    flaw: Flaw,
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl OpenSession for Opening {
    /// The open has fetched it.
    async fn read(&mut self) -> Result<Option<Record>> {
        self.inner.read().await
    }

    async fn write(&mut self, record: &Record, id: WriteId) -> Result<Written> {
        self.wire.fly(1).await?;
        self.inner.write(record, id).await
    }

    async fn destroy(&mut self) -> Result<Option<Record>> {
        self.wire.fly(if self.flaw == Flaw::DestroyLooksFirst { 2 } else { 1 }).await?;
        self.inner.destroy().await
    }

    async fn close(&mut self) -> Result<()> {
        self.inner.close().await
    }

    async fn touch(&mut self, ttl: Ttl) -> Result<Written> {
        self.wire.fly(1).await?;
        self.inner.touch(ttl).await
    }

    async fn save(&mut self, change: &Change, id: WriteId) -> Result<Written> {
        self.wire.fly(if self.flaw == Flaw::SaveWritesThenUnlocks { 2 } else { 1 }).await?;
        self.inner.save(change, id).await
    }

    fn held(&self) -> Option<&Held> {
        self.inner.held()
    }
}
