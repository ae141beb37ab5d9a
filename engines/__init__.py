"""Engines: a bundle becomes scores. One class an engine, all behind `dlrm_deploy.engines.engine.Engine`."""
