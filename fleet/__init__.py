"""Many nodes as one: bundles, the fleet store, attribution, advisories, distributed probing."""
