"""Settings of Hypothesis for all tests: no deadlines, so that a busy machine does not make tests fail."""

from hypothesis import HealthCheck, settings

settings.register_profile("migfw", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("migfw")
