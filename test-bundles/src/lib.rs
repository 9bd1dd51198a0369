//! OCI bundles, workload programs and the end-to-end tests of Ferry.
