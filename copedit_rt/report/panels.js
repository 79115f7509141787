// One viewer a volume, cursors linked. Volumes are in the page, as a page opened from a file may read no others.
(async () => {
  const volumes = JSON.parse(document.getElementById("volumes").textContent);
  try {
    const viewers = [];
    for (const [i, volume] of volumes.entries()) {
      const viewer = new niivue.Niivue({
        logLevel: "silent", isRadiologicalConvention: true, isColorbar: false, backColor: [0, 0, 0, 1],
        crosshairColor: [1, 0.59, 0.12, 0.6], crosshairWidth: 0.4, crosshairWidthUnit: "mm", dragAndDropEnabled: false, loadingText: "",
        show3Dcrosshair: false, multiplanarShowRender: 0, multiplanarLayout: 2, textHeight: 0.04,
      });
      await viewer.attachToCanvas(document.getElementById("canvas" + i));
      viewer.addVolume(await niivue.NVImage.loadFromBase64({
        base64: volume.content, name: volume.name + ".nii.gz", colormap: volume.colormap, cal_min: 0, cal_max: 255,
      }));
      viewer.setSliceType(viewer.sliceTypeMultiplanar);
      viewers.push(viewer);
    }
    for (const viewer of viewers) {
      viewer.broadcastTo(viewers.filter((other) => other !== viewer), { "2d": true, "3d": false });
    }
    window.viewers = viewers;
    document.body.dataset.state = "shown";
  } catch (error) {
    document.body.dataset.state = "failed";
    document.getElementById("panels").textContent =
      "This browser cannot show the volumes (" + error + "); the still picture below shows the same study.";
    console.error(error);
  }
})();
