from flow_trl.metrics.spaces import launch


launch(__file__)
