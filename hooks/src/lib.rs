//! OCI hooks, action scripts and notifications.
