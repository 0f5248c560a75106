"""Programs that come with the machine: `migfw run stress`, `migfw run life`."""
