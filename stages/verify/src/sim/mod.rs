//! Whole clusters of tallies under seeded faults.
