//! Frames held per epoch and released on commit; the tap device; announcements.
