"""How Hypothesis runs in every test of the repository: a loaded machine is no failure, so no example has a deadline."""

from hypothesis import HealthCheck, settings

settings.register_profile("migfw", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("migfw")
