//! (skeleton)
use std::sync::Arc;

use crate::config::SqlConfig;
use crate::database::{Database, Failure, Owner};

pub(crate) async fn connect(
    _address: &crate::config::SqlAddress,
    _config: &SqlConfig,
    _owner: Owner,
) -> Result<Arc<dyn Database>, Failure> {
    Err(Failure::new(session_core::ErrorKind::Config, "skeleton"))
}
